"""Exponential moving average of weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latentdiff.learning.sharding import split_like


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that require gradients."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class EMA:
    """A float32 average of those of a module's parameters that are trained.

    Which these are is settled here, so make it when the module is where it is trained: to walk
    through the module at each step would take longer than the average does.

    The decay warms up as (1 + n) / (10 + n) so that early averages are not the initial weights.
    Call `update` once per optimizer step, when gradients were synchronised.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        parameters = trained_parameters(module)
        self.names = list(parameters)
        self.live = list(parameters.values())
        self.shadow = [p.detach().float().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """shadow <- decay * shadow + (1 - decay) * parameter."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for shadow, live in zip(self.shadow, self.live, strict=True):
            shadow.lerp_(live.float(), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context the module holds the averaged weights."""
        live = [p.detach().clone() for p in self.live]
        self._copy(self.shadow)
        try:
            yield
        finally:
            self._copy(live)

    @torch.no_grad()
    def _copy(self, source: list[Tensor]) -> None:
        for parameter, value in zip(self.live, source, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> averaged parameter."""
        return dict(zip(self.names, self.shadow, strict=True))

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Put a saved average back."""
        for name, shadow in zip(self.names, self.shadow, strict=True):
            shadow.copy_(split_like(state[name], shadow))
        self.updates = updates

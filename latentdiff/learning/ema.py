"""Exponential moving average of weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that require gradients."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class EMA:
    """A float32 average of those of a module's parameters that are trained.

    The decay warms up as (1 + n) / (10 + n) so that early averages are not the initial weights.
    Call `update` once per optimizer step, when gradients were synchronised.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.names = list(trained(module))
        self.shadow = [p.detach().float().clone() for p in trained(module).values()]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """shadow <- decay * shadow + (1 - decay) * parameter."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live = [p.detach().float() for p in trained(module).values()]
        for shadow, value in zip(self.shadow, live, strict=True):
            shadow.lerp_(value, 1.0 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside the context the module holds the averaged weights."""
        live = [p.detach().clone() for p in trained(module).values()]
        self._copy(self.shadow, module)
        try:
            yield
        finally:
            self._copy(live, module)

    @torch.no_grad()
    def _copy(self, source: list[Tensor], module: nn.Module) -> None:
        for parameter, value in zip(trained(module).values(), source, strict=True):
            parameter.copy_(value)

    def to(self, device: torch.device) -> None:
        """Move the averages to a device."""
        self.shadow = [value.to(device) for value in self.shadow]

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> averaged parameter."""
        return dict(zip(self.names, self.shadow, strict=True))

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Put a saved average back."""
        for name, shadow in zip(self.names, self.shadow, strict=True):
            shadow.copy_(state[name])
        self.updates = updates

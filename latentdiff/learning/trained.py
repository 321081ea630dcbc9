"""A network in training: its optimizer, its learning rate, its average and its checkpoint."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW, Optimizer

from latentdiff.learning.checkpoint import Tensors
from latentdiff.learning.config import OptimConfig
from latentdiff.learning.ema import EMA, trained_parameters


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Linear warm-up, then constant or cosine to zero: a function of the step alone."""
    warm = min(1.0, (step + 1) / max(1, optim.warmup))
    if optim.schedule == "constant":
        return optim.lr * warm
    done = max(0.0, (step - optim.warmup) / max(1, optim.steps - optim.warmup))
    return optim.lr * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def adamw(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], optim: OptimConfig
) -> AdamW:
    """AdamW as the configuration says, of parameters or of groups of them."""
    return AdamW(
        parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )


class Trained:
    """A network that learns, with its optimizer and the average of its weights.

    Args:
        name: name of its file in a checkpoint.
        module: the network; those of its parameters learn that require gradients.
        optim: the learning rate and its curve, the clipping and the average of this network.
        make_optimizer: makes the optimizer of these parameters; by default AdamW as `optim` says.
        called: the module around it that the loss calls, where that is not the network itself.
        averaged: whether a float32 average of the weights (EMA) is kept.

    Attributes:
        network: what the loss calls: `called`, or the module, as Accelerate prepared it.
        parameters: the trained parameters, once prepared.
        ema: their average, once prepared.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        optim: OptimConfig,
        make_optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] | None = None,
        *,
        called: nn.Module | None = None,
        averaged: bool = True,
    ) -> None:
        self.name = name
        self.module = module
        self.optim = optim
        make = make_optimizer or partial(adamw, optim=optim)
        self.optimizer = make(iter(trained_parameters(module).values()))
        self.network: nn.Module = module if called is None else called
        self.averaged = averaged
        self.parameters: list[nn.Parameter] = []
        self.ema: EMA | None = None

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step` (counted from 0)."""
        return learning_rate(self.optim, step)

    def told_rate(self, step: int) -> float:
        """The same times what the optimizer has found by itself (Prodigy's d)."""
        return self.rate(step) * self.optimizer.param_groups[0].get("d", 1.0)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside the context the weights are those to draw and save with, where the optimizer tells
        them from those that it steps on (schedule-free); afterwards they are as they were, to the
        bit, so that how often is drawn changes nothing."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if not any(group.get("train_mode") for group in optimizer.param_groups):
            yield
            return
        stepped = [p.detach().clone() for p in self.parameters]
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            with torch.no_grad():
                for parameter, value in zip(self.parameters, stepped, strict=True):
                    parameter.copy_(value)

    def average(self) -> None:
        """Take the weights into their average, if there is one."""
        if self.ema is not None:
            self.ema.update()

    def weights(self) -> Tensors:
        """Collect the tensors for a checkpoint: the trained parameters and all buffers."""
        learns = {name: p.detach() for name, p in trained_parameters(self.module).items()}
        known = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        buffers = {name: t for name, t in self.module.state_dict().items() if name not in known}
        return learns | buffers

    def load_weights(self, weights: Tensors) -> None:
        """Put saved weights back, before the network is prepared.

        Raises:
            ValueError: the tensors are not those of this network.
        """
        differ = self.module.load_state_dict(weights, strict=False)
        lost = set(differ.missing_keys) & self.weights().keys()
        if wrong := sorted(lost) + differ.unexpected_keys:
            raise ValueError(f"the checkpoint's {self.name} is of another network: {wrong[0]}")


def prepare(accelerator: Accelerator, networks: Sequence[Trained]) -> None:
    """Have Accelerate wrap the networks and their optimizers, and begin the averages."""
    count = len(networks)
    ready = accelerator.prepare(
        *(one.network for one in networks), *(one.optimizer for one in networks)
    )
    for number, one in enumerate(networks):
        one.network, one.optimizer = ready[number], ready[count + number]
        one.parameters = list(trained_parameters(one.module).values())
        one.ema = EMA(one.module, one.optim.ema_decay) if one.averaged else None


@contextmanager
def averages(networks: Sequence[Trained]) -> Iterator[None]:
    """Inside the context the networks hold their averaged weights."""
    with ExitStack() as stack:
        for one in networks:
            stack.enter_context(one.at_rest())
            if one.ema is not None:
                stack.enter_context(one.ema.applied())
        yield

"""A network whose x_0 is a formula of everything that it is told, for the tests of guidance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import (
    Branch,
    ConditionedDenoiser,
    Estimate,
    conditioned_denoiser,
)
from latentdiff.diffusion.process import NoiseLevel, Process


class Told:
    """x_0 = tanh(x / (1 + number of the perturbation) + pooled + mean of what is beside x).

    Each row is told its own `pooled` [B, 1], so that rows which are mixed up are found out.

    Attributes:
        batches: the number of rows of each call.
    """

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int]
    ) -> Tensor:
        assert condition.pooled is not None
        assert len(x) == len(t) == len(condition.pooled)
        self.batches.append(len(x))
        numbers = torch.tensor(perturbed or [0]).repeat_interleave(len(x) // len(perturbed or [0]))
        shift = condition.pooled
        if condition.beside is not None:
            shift = shift + condition.beside.mean((1, 2, 3))[:, None]
        return told(x, shift, numbers[:, None])

    def denoiser(self, process: Process) -> ConditionedDenoiser:
        """The denoiser of this network, which predicts x_0."""
        return conditioned_denoiser(self, process, "x0")


def told(x: Tensor, shift: float | Tensor, number: int | Tensor = 0) -> Tensor:
    """The answer for x [B, C, H, W]; shift and number are numbers, or [B, 1]."""
    shift, number = (torch.as_tensor(value).to(x) for value in (shift, number))
    shape = (-1, *(1,) * (x.ndim - 1))
    return torch.tanh(x / (1 + number.reshape(shape)) + shift.reshape(shape))


def telling(*shifts: float) -> Condition:
    """The condition of as many pictures."""
    return Condition(pooled=torch.tensor(shifts, dtype=torch.float64)[:, None])


def one_by_one(denoise: ConditionedDenoiser) -> ConditionedDenoiser:
    """The same, but each branch is asked in a call of its own."""

    def asked(x: Tensor, level: NoiseLevel, branches: Sequence[Branch]) -> tuple[Estimate, ...]:
        return tuple(denoise(x, level, [branch])[0] for branch in branches)

    return asked

"""Adaptive projected guidance: less of what over-saturates."""

import math

import torch
from torch import Tensor

from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import Branch, ConditionedDenoiser, Denoiser, Estimate, bind
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError, check_finite


def projected(
    denoise: ConditionedDenoiser,
    positive: Condition,
    negative: Condition,
    *,
    scale: float,
    parallel: float = 0.0,
    largest: float = math.inf,
    momentum: float = 0.0,
) -> Denoiser:
    """Adaptive projected guidance: Sadat et al. 2025 (APG), algorithm 1, in x_0.

    What guidance adds is averaged over the levels of a run, shortened to a largest norm and split
    along the conditional x_0, which over-saturates, and across it.

    With momentum the denoiser remembers its run, so each run (each call of the pipeline) makes its
    own. A step to a noisier level (a jump back, a new run) starts the average anew; a level asked
    for again (a corrector) takes the place of its first answer.

    Args:
        denoise: the denoiser to guide.
        positive: what the pictures shall show, for B pictures.
        negative: what they shall not, or the empty condition.
        scale: strength; 1 is off.
        parallel: their eta, the share of the part along x_0 that is kept; 1 keeps all.
        largest: their r, norm of one picture's difference.
        momentum: their beta, mostly negative: the average is difference + beta * the one before.

    Raises:
        UserError: a scale that is not finite, a norm that is not positive, or a momentum that
            would grow without end.
    """
    check_finite(scale, "guidance scale")
    if not largest > 0:
        raise UserError(f"APG needs a norm above 0, not {largest}.")
    if not -1 < momentum < 1:
        raise UserError(f"the momentum of APG must lie between -1 and 1, not {momentum}.")
    if scale == 1:
        return bind(denoise, positive)
    branches = [Branch("negative", negative), Branch("positive", positive)]
    averaged = _Momentum(momentum)

    def guided(x: Tensor, level: NoiseLevel) -> Estimate:
        away, towards = denoise(x, level, branches)
        x0 = towards.x0
        change = averaged(x0 - away.x0, level) if momentum else x0 - away.x0
        tiny = torch.finfo(x.dtype).tiny
        axes = tuple(range(1, x.ndim))
        if largest < math.inf:
            norm = torch.linalg.vector_norm(change, dim=axes, keepdim=True).clamp(min=tiny)
            change = change * (largest / norm).clamp(max=1)
        square = x0.square().sum(axes, keepdim=True).clamp(min=tiny)
        along = (change * x0).sum(axes, keepdim=True) / square * x0
        return towards.with_x0(x0 + (scale - 1) * (change - along + parallel * along))

    return guided


class _Momentum:
    """average(level) = change + beta * average(the level before), within one run."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.level: NoiseLevel | None = None
        self.average: Tensor | None = None
        self.before: Tensor | None = None

    def __call__(self, change: Tensor, level: NoiseLevel) -> Tensor:
        if self.level is not None and level.log_snr < self.level.log_snr:
            self.average = self.before = None
        elif self.level is not None and level.log_snr > self.level.log_snr:
            self.before = self.average
        self.level = level
        self.average = change if self.before is None else change + self.beta * self.before
        return self.average

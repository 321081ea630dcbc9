"""More ways to guide: several prompts, projection, CFG++, a weaker model, thresholds."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Condition, ConditionedDenoiser, Denoiser, bind
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.guidance.batch import together


def weighted(
    denoise: ConditionedDenoiser,
    positives: Sequence[Condition],
    weights: Sequence[float],
    negative: Condition,
) -> Denoiser:
    """Several conditions at once: x_0 = negative + sum_i w_i (x_0i - negative).

    Liu et al. 2022 (Composable Diffusion), eq. 11: a product of experts. One condition of weight w
    is classifier-free guidance of scale w; negative weights steer away. All go through the network
    as one batch.

    Args:
        denoise: the denoiser to guide.
        positives: K conditions, for B pictures.
        weights: K scales.
        negative: the empty or negative condition, for B pictures.

    Raises:
        UserError: no condition, another number of weights, a weight that is not finite, or
            conditions of different shapes.
    """
    if not positives or len(positives) != len(weights):
        raise UserError(f"{len(weights)} weights were given for {len(positives)} conditions.")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"guidance weights must be finite numbers, not {list(weights)}.")
    estimates = together(denoise, [negative, *positives])

    def guided(x: Tensor, level: NoiseLevel) -> Tensor:
        base, *others = estimates(x, level)
        total = base
        for weight, x0 in zip(weights, others, strict=True):
            total = total + weight * (x0 - base)
        return total

    return guided


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
    if not math.isfinite(scale) or not largest > 0:
        raise UserError(f"APG needs a finite scale and a norm above 0, not {scale} and {largest}.")
    if not -1 < momentum < 1:
        raise UserError(f"the momentum of APG must lie between -1 and 1, not {momentum}.")
    if scale == 1:
        return bind(denoise, positive)
    both = together(denoise, [negative, positive])
    averaged = _Momentum(momentum)

    def guided(x: Tensor, level: NoiseLevel) -> Tensor:
        x0_negative, x0 = both(x, level)
        change = averaged(x0 - x0_negative, level) if momentum else x0 - x0_negative
        tiny = torch.finfo(x.dtype).tiny
        axes = tuple(range(1, x.ndim))
        if largest < math.inf:
            norm = torch.linalg.vector_norm(change, dim=axes, keepdim=True).clamp(min=tiny)
            change = change * (largest / norm).clamp(max=1)
        square = x0.square().sum(axes, keepdim=True).clamp(min=tiny)
        along = (change * x0).sum(axes, keepdim=True) / square * x0
        return x0 + (scale - 1) * (change - along + parallel * along)

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


def cfg_plus_plus(
    denoise: ConditionedDenoiser,
    positive: Condition,
    negative: Condition,
    timetable: Timetable,
    *,
    strength: float,
) -> Denoiser:
    """CFG++: Chung et al. 2025 (CFG++), algorithm 2: guided x_0, but unguided noise.

    DDIM's step with x_0 = negative + strength (positive - negative) and the noise of the negative
    condition is the step with classifier-free guidance of scale strength / (1 - q), where
    q = alpha sigma' / (alpha' sigma) and primes mark the next level; so it goes with every solver
    that draws no noise. (One that does keeps less of the negative condition's noise, and the
    step is one of a strength of up to (1 + q) times as much.) Between two levels of the timetable
    the scale is that of the interval.

    Args:
        denoise: the denoiser to guide.
        positive: what the pictures shall show, for B pictures.
        negative: what they shall not, or the empty condition.
        timetable: of the run.
        strength: their lambda, in 0..1. (It is no scale: 0 is the negative condition alone.)

    Raises:
        UserError: strength outside 0..1, or a timetable of fewer than two levels.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"the scale of 'cfg++' must lie between 0 and 1, as 0.6, not {strength}.")
    if len(timetable) < 2:
        raise UserError("CFG++ needs the timetable of the run.")
    falling = sorted(set(timetable), key=lambda level: level.log_snr)
    both = together(denoise, [negative, positive])

    def guided(x: Tensor, level: NoiseLevel) -> Tensor:
        x0_negative, x0 = both(x, level)
        index = sum(other.log_snr <= level.log_snr for other in falling[:-1])
        here, there = falling[max(index, 1) - 1], falling[max(index, 1)]
        shared = here.alpha * there.sigma / (there.alpha * here.sigma)
        return x0_negative + strength / (1 - shared) * (x0 - x0_negative)

    return guided


def from_weaker(strong: Denoiser, weak: Denoiser, *, scale: float) -> Denoiser:
    """Autoguidance: Karras et al. 2024 (Guiding a Diffusion Model with a Bad Version of Itself).

    x_0 = weak + scale (strong - weak), of two networks; 1 is off: only the strong one runs then.

    Raises:
        UserError: a scale that is not finite.
    """
    if not math.isfinite(scale):
        raise UserError(f"guidance scale must be a finite number, not {scale}.")
    if scale == 1:
        return strong

    def guided(x: Tensor, level: NoiseLevel) -> Tensor:
        x0_weak = weak(x, level)
        return x0_weak + scale * (strong(x, level) - x0_weak)

    return guided


def thresholded(denoise: Denoiser, *, quantile: float = 0.995, at_least: float = 1.0) -> Denoiser:
    """Dynamic thresholding: Saharia et al. 2022 (Imagen), section 2.3, around any denoiser.

    Each picture's x_0 is clipped to +-s and scaled by at_least / s, s the quantile of its |x_0|,
    but not below `at_least`: 1 for pixels in [-1, 1], more for latents.

    Raises:
        UserError: a quantile outside 0..1, or a bound that is not positive.
    """
    if not 0 < quantile <= 1 or not 0 < at_least < math.inf:
        raise UserError(
            f"thresholding needs a quantile within 0..1 and a bound above 0, "
            f"not {quantile} and {at_least}."
        )

    def guided(x: Tensor, level: NoiseLevel) -> Tensor:
        x0 = denoise(x, level)
        bound = x0.abs().flatten(1).quantile(quantile, dim=1).clamp(min=at_least)
        bound = bound.view(-1, *[1] * (x0.ndim - 1))
        return torch.minimum(torch.maximum(x0, -bound), bound) * (at_least / bound)

    return guided


def from_classifier(
    denoise: Denoiser,
    log_probability: Callable[[Tensor, NoiseLevel], Tensor],
    *,
    strength: float,
) -> Denoiser:
    """Classifier guidance: Dhariwal & Nichol 2021, algorithm 1.

    The score becomes score + strength grad ln p(y | x_t); in x_0 that adds strength sigma^2 / alpha
    times the gradient. Of pure noise no classifier can tell anything: there, nothing is added.

    Args:
        denoise: the denoiser to guide.
        log_probability: (x_t [B, C, H, W], level) -> ln p(y | x_t) [B], differentiable in x_t.
        strength: 0 is off.

    Raises:
        UserError: a strength that is not finite.
    """
    if not math.isfinite(strength):
        raise UserError(f"guidance strength must be a finite number, not {strength}.")
    if strength == 0:
        return denoise

    def guided(x: Tensor, level: NoiseLevel) -> Tensor:
        x0 = denoise(x, level)
        if level.alpha == 0:
            return x0
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_probability(leaf, level).sum(), leaf)
        return x0 + strength * level.sigma**2 / level.alpha * gradient

    return guided

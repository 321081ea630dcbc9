"""Likelihood of data in bits per dimension: the variational bound, and the ODE's exact value.

For latents these are bits per latent dimension: compare only models with the same autoencoder.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import Coefficient, NoiseLevel, Process, transition
from latentdiff.diffusion.solver import posterior_std
from latentdiff.diffusion.timetable import Timetable
from latentdiff.diffusion.variance import Variance, gaussian_kl, gaussian_surprise, learned_log_std
from latentdiff.errors import UserError

# A flow from pure noise (alpha 0) is integrated from here; x is noise there to one part in 10^6.
_LARGEST_RATIO = 1000.0


@dataclass(frozen=True, slots=True)
class Bound:
    """The variational bound of Ho et al. 2020 (DDPM), eq. 5, term by term, in bits per dimension.

    Attributes:
        prior: [B], L_T.
        steps: [N - 1, B], the L_(t-1), from noise to data.
        reconstruction: [B], L_0.
    """

    prior: Tensor
    steps: Tensor
    reconstruction: Tensor

    @property
    def total(self) -> Tensor:
        """[B]: at least the negative log-likelihood, in expectation over the noise."""
        return self.prior + self.steps.sum(0) + self.reconstruction


def variational_bound(
    denoise: Denoiser,
    x0: Tensor,
    process: Process,
    timetable: Timetable,
    noise: NoiseStreams,
    *,
    variance: Variance | None = None,
    bin_width: float | None = None,
) -> Bound:
    """The variational bound of a DDPM that steps through a timetable: Ho et al. 2020, eq. 5.

    Each term is estimated at one x_t of its own, so it costs an evaluation a level.

    Args:
        denoise: (x_t, level) -> x_0.
        x0: [B, C, H, W].
        process: tells the prior.
        timetable: falling levels of which the last is clean data.
        noise: streams of B pictures.
        variance: variance of the steps, as in `solvers.DDPM`. A learned one is also that of L_0,
            where the posterior's, which is 0, is replaced by that of the step before, as in the
            code of Nichol & Dhariwal 2021; a fixed one is the kernel's there.
        bin_width: bin width of discrete data (2 / 255 for bytes in [-1, 1]), as in eq. 13; None for
            continuous data, whose bits may be negative.

    Raises:
        UserError: a timetable that does not fall to clean data in two steps or more; or a learned
            variance of a denoiser that tells none.
    """
    levels = list(timetable)
    if len(levels) < 3 or levels[-1].sigma > 0:
        raise UserError("the bound needs a timetable of at least 2 steps that ends in clean data.")
    if any(later.log_snr <= level.log_snr for level, later in pairwise(levels)):
        raise UserError("the bound needs a timetable without jumps back.")
    ask = _teller(denoise, variance)
    first, last = levels[0], levels[-2]
    prior = gaussian_kl(
        math.log(first.sigma), math.log(process.prior_scale(first)), first.alpha * x0
    )
    steps = [
        _step_term(ask, x0, here, there, noise, large=variance == "fixed-large")
        for here, there in pairwise(levels[:-1])
    ]
    guess, v = ask(last.alpha * x0 + last.sigma * noise.like(x0), last)
    log_std = math.log(transition(levels[-1], last)[1])
    if v is not None:
        log_std = learned_log_std(v, math.log(posterior_std(levels[-3], last)), log_std)
    reconstruction = -_log_decoder(x0 - guess, log_std, bin_width)
    return Bound(_bits(prior), torch.stack([_bits(step) for step in steps]), _bits(reconstruction))


def _teller(
    denoise: Denoiser, variance: Variance | None
) -> Callable[[Tensor, NoiseLevel], tuple[Tensor, Tensor | None]]:
    """(x_t, level) -> x_0, and v where it is wanted and told."""

    def ask(x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor | None]:
        estimate = denoise(x, level)
        if variance == "learned-range" and estimate.variance is None:
            raise UserError("the variance 'learned-range' needs a denoiser that tells it.")
        learned = variance in (None, "learned-range")
        return estimate.x0, estimate.variance if learned else None

    return ask


def _step_term(
    ask: Callable[[Tensor, NoiseLevel], tuple[Tensor, Tensor | None]],
    x0: Tensor,
    here: NoiseLevel,
    there: NoiseLevel,
    noise: NoiseStreams,
    large: bool,
) -> Tensor:
    """KL of q(x_there | x_here, x_0) from the model's step, in nats of each number."""
    std, kernel_std = posterior_std(here, there), transition(there, here)[1]
    guess, v = ask(here.alpha * x0 + here.sigma * noise.like(x0), here)
    keep = math.sqrt(max(0.0, there.sigma**2 - std**2)) / here.sigma
    small, log_std = math.log(std), math.log(kernel_std if large else std)
    if v is not None:
        log_std = learned_log_std(v, small, math.log(kernel_std))
    return gaussian_kl(small, log_std, (there.alpha - keep * here.alpha) * (x0 - guess))


def _log_decoder(error: Tensor, log_std: Coefficient, bin_width: float | None) -> Tensor:
    """ln p(x_0 | x_1) of each number: a density, or the mass of a bin (without their open ends)."""
    if bin_width is None:
        return -gaussian_surprise(error, log_std)
    std = torch.as_tensor(log_std, dtype=error.dtype, device=error.device).exp()
    upper, lower = (error + 0.5 * bin_width) / std, (error - 0.5 * bin_width) / std
    mass = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    return mass.clamp(min=1e-12).log()


def _bits(nats: Tensor) -> Tensor:
    """[B, C, H, W] nats of each number -> [B] bits per dimension."""
    return nats.flatten(1).mean(1) / math.log(2)


def flow_bits(
    denoise: Denoiser,
    x0: Tensor,
    process: Process,
    noise: NoiseStreams,
    *,
    probes: int = 1,
    steps: int = 100,
) -> Tensor:
    """Negative log-likelihood by the probability flow: Song et al. 2021, eq. 39 and section D.2.

    x_0 is taken at the process's t_min, without noise, and carried to t_max by the Runge-Kutta
    method of order 4, even in log-SNR. The divergence is Hutchinson's estimate, by the same
    Rademacher probes at every step; it is exact where each number of x_0 depends on its own alone.

    With y = x / r, r = sqrt(alpha^2 + sigma^2), and l = ln(alpha / sigma), the flow is
    dy/dl = alpha (r x_0 - alpha y) / r^2; its divergence is alpha (r^2 tr dx_0/dx - alpha D) / r^2.

    Args:
        denoise: (x_t, level) -> x_0, differentiable in x_t.
        x0: [B, C, H, W].
        process: the forward process.
        noise: streams of B pictures, for the probes.
        probes: random probes of the divergence, averaged.
        steps: steps of the integration, 4 evaluations each.

    Returns:
        [B] bits per dimension of continuous data; may be negative.

    Raises:
        UserError: no probe or no step.
    """
    if probes < 1 or steps < 1:
        raise UserError("the flow needs at least 1 probe and at least 1 step.")
    start, end = process.level(process.t_min), process.level(process.t_max)
    if end.alpha == 0:
        end = process.level_of_ratio(_LARGEST_RATIO)
    signs = [torch.where(noise.like(x0) < 0, -1.0, 1.0).to(x0.dtype) for _ in range(probes)]
    place, last = 0.5 * start.log_snr, 0.5 * end.log_snr
    length = (last - place) / steps

    def slopes(place: float, y: Tensor) -> tuple[Tensor, Tensor]:
        return _slopes(denoise, process.level(process.t_of_log_snr(2 * place)), y, signs)

    y, divergence = start.alpha / math.hypot(start.alpha, start.sigma) * x0, torch.zeros(len(x0))
    divergence = divergence.to(x0)
    for index in range(steps):
        change, gain = _runge_kutta(slopes, place + index * length, length, y)
        y, divergence = y + change, divergence + gain
    scale = process.prior_scale(end) / math.hypot(end.alpha, end.sigma)
    log_prior = -0.5 * (y / scale).square() - math.log(scale * math.sqrt(2 * math.pi))
    # ln p(x_0) = ln p(y at the noise end) + the divergence along the way + ln |dy / dx_0|.
    log_start = math.log(start.alpha / math.hypot(start.alpha, start.sigma))
    nats = -log_prior.flatten(1).sum(1) - divergence
    return nats / (x0[0].numel() * math.log(2)) - log_start / math.log(2)


def _slopes(
    denoise: Denoiser, level: NoiseLevel, y: Tensor, signs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """dy/dl [B, C, H, W] and its divergence [B]."""
    size = math.hypot(level.alpha, level.sigma)
    with torch.enable_grad():
        x = (size * y).detach().requires_grad_()
        x0 = denoise(x, level).x0
        trace = torch.zeros(len(y), dtype=y.dtype, device=y.device)
        for sign in signs:
            (row,) = torch.autograd.grad((x0 * sign).sum(), x, retain_graph=True)
            trace = trace + (row * sign).flatten(1).sum(1) / len(signs)
    slope = level.alpha * (size * x0.detach() - level.alpha * y) / size**2
    divergence = level.alpha * (size**2 * trace - level.alpha * y[0].numel()) / size**2
    return slope, divergence


def _runge_kutta(
    slopes: Callable[[float, Tensor], tuple[Tensor, Tensor]], place: float, length: float, y: Tensor
) -> tuple[Tensor, Tensor]:
    """The increments of y and of the divergence integral over one classical RK4 step."""
    first, gain_first = slopes(place, y)
    second, gain_second = slopes(place + length / 2, y + length / 2 * first)
    third, gain_third = slopes(place + length / 2, y + length / 2 * second)
    fourth, gain_fourth = slopes(place + length, y + length * third)
    change = length / 6 * (first + 2 * second + 2 * third + fourth)
    gain = length / 6 * (gain_first + 2 * gain_second + 2 * gain_third + gain_fourth)
    return change, gain

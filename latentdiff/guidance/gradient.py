"""Guidance by the gradient of a score of what the pictures will be."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser, Estimate
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError, check_finite


def from_estimate(
    denoise: Denoiser,
    score: Callable[[Tensor], Tensor],
    *,
    strength: float,
    through: bool = True,
    interval: tuple[float, float] = (0.0, math.inf),
) -> Denoiser:
    """Guide by a score of clean latents: ln p(y | x_t) is taken for score(x_0(x_t)).

    Through the network that is Chung et al. 2023 (Diffusion Posterior Sampling), eq. 10, with the
    score's gradient in x_t: x_0 + strength sigma^2 / alpha grad. By the chain rule it is
    strength Cov[x_0 | x_t] grad score(x_0), for sigma^2 / alpha dx_0/dx_t is that covariance
    (Tweedie). Not through the network, the covariance is taken to be that of standard normal
    latents, sigma^2 / (alpha^2 + sigma^2), as Song et al. 2023 (Pseudoinverse-guided diffusion),
    sec. 3.2, have it: only the gradient of the score itself is computed, at about half the cost.

    Gradients are enabled here, whatever the caller has set. Of pure noise (alpha = 0) only the
    second way says anything; in the first, nothing is added there.

    Args:
        denoise: the denoiser to guide, with its own guidance.
        score: x_0 [B, C, H, W] -> [B], a log-probability up to a constant, differentiable.
        strength: 0 is off.
        through: whether the gradient goes through the network.
        interval: only where low < sigma / alpha <= high.

    Raises:
        UserError: a strength or an interval out of range.
    """
    low, high = interval
    check_finite(strength, "guidance strength")
    if not 0 <= low <= high:
        raise UserError(
            f"guidance needs an interval from a small sigma to a large one, not {interval}."
        )
    if strength == 0:
        return denoise

    def guided(x: Tensor, level: NoiseLevel) -> Estimate:
        if not low < level.ratio <= high:
            return denoise(x, level)
        if through:
            return _through(denoise, score, x, level, strength)
        estimate = denoise(x, level)
        power = level.alpha**2 + level.sigma**2
        change = strength * level.sigma**2 / power * _gradient(score, estimate.x0)
        return estimate.with_x0(estimate.x0 + change)

    return guided


def _through(
    denoise: Denoiser,
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    level: NoiseLevel,
    strength: float,
) -> Estimate:
    if level.alpha == 0:
        return denoise(x, level)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        estimate = denoise(leaf, level)
        (gradient,) = torch.autograd.grad(score(estimate.x0).sum(), leaf)
    x0 = estimate.x0.detach() + strength * level.sigma**2 / level.alpha * gradient
    v = estimate.variance
    return Estimate(x0, None if v is None else v.detach())


def _gradient(score: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x0.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(score(leaf).sum(), leaf)
    return gradient

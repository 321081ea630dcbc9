"""Denoising diffusion GANs: few steps, each of which draws from a distribution of many shapes.

Xiao et al. 2022, "Tackling the Generative Learning Trilemma with Denoising Diffusion GANs". A
generator makes x_0 of x_t and noise; x_s of the step is drawn from q(x_s | x_t, x_0), the posterior
of DDPM; a discriminator tells such pairs (x_s, x_t) from those of the forward process.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from latentdiff.learning.distillation import Levels, noised
from latentdiff.learning.order import Stream, generator


def kernel(clean: Levels, noisy: Levels) -> tuple[Tensor, Tensor]:
    """Scale and standard deviation of q(x_noisy | x_clean) [B, 1, 1, 1], in float64.

    Kingma et al. 2021 (Variational Diffusion Models), appendix A.
    """
    scale = noisy.alpha / clean.alpha
    variance = noisy.sigma.square() - (scale * clean.sigma).square()
    return scale, variance.clamp(min=0).sqrt()


def forward_pair(
    latents: Tensor, noise: Tensor, more: Tensor, here: Levels, there: Levels
) -> tuple[Tensor, Tensor]:
    """Draw (x_there, x_here) of the forward process: x_there given x_0, x_here given x_there.

    Args:
        latents: x_0 [B, C, h, w].
        noise, more: standard normal [B, C, h, w], of the first and of the second draw.
        here: the noisier level of each picture.
        there: the cleaner one, perhaps without noise.

    Returns:
        x_there and x_here [B, C, h, w].
    """
    cleaner = noised(latents, noise, there)
    scale, std = kernel(there, here)
    return cleaner, scale.to(cleaner) * cleaner + std.to(cleaner) * more


def posterior_draw(x0: Tensor, x: Tensor, noise: Tensor, here: Levels, there: Levels) -> Tensor:
    """Draw from q(x_there | x_here, x_0) of an x_0 that was made: Ho et al. 2020, eq. 6-7.

    It is the step of the solver "ddpm" with the posterior's own variance.

    Args:
        x0, x, noise: x_0, x_here and standard normal noise [B, C, h, w].
        here, there: the levels of each picture.
    """
    std = there.sigma / here.sigma * kernel(there, here)[1]
    keep = (there.sigma.square() - std.square()).clamp(min=0).sqrt() / here.sigma
    mean = keep.to(x) * x + (there.alpha - keep * here.alpha).to(x) * x0
    return mean + std.to(x) * noise


def discriminator_loss(real: Tensor, made: Tensor) -> Tensor:
    """-log D(real) - log(1 - D(made)) of logits [B], means: Xiao et al. 2022.

    Its minimum over all discriminators is log 4 where both are drawn alike, at a logit of 0.
    """
    return softplus(-real).mean() + softplus(made).mean()


def generator_loss(made: Tensor) -> Tensor:
    """-log D(made) of logits [B], the mean: the non-saturating loss of Goodfellow et al. 2014."""
    return softplus(-made).mean()


def gradient_penalty(logits: Tensor, real: Tensor) -> Tensor:
    """R1: half the squared norm of d logit / d real, a mean (Mescheder et al. 2018).

    Args:
        logits: of real pairs [B].
        real: their x_there [B, C, h, w], which requires its gradient.
    """
    (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return 0.5 * slope.square().flatten(1).sum(1).mean()


def draw_codes(seed: int, step: int, places: Sequence[int], width: int) -> Tensor:
    """The noise that a generator is told [B, width], standard normal: f(seed, step, place)."""
    draws = [generator(seed, Stream.CODE, step, place) for place in places]
    return torch.from_numpy(np.stack([d.standard_normal(width, dtype=np.float32) for d in draws]))

"""Conversion between a network's prediction types, done once and exactly.

With x_t = alpha x_0 + sigma noise, the five predictions are

    eps    noise
    x0     x_0
    v      (alpha noise - sigma x_0) / sqrt(alpha^2 + sigma^2)
    score  -noise / sigma, the gradient of ln p(x_t)
    flow   noise - x_0

v is that of Salimans & Ho 2022 (Progressive Distillation), appendix D, where the root is 1; with
the root it is also well defined, and equal to EDM's preconditioning, where alpha stays 1. Only
eps and score must divide by alpha: of pure noise (alpha = 0) they say nothing about x_0, and the
answer there is 0, the mean of normalised latents.

Coefficients are floats, or tensors that broadcast against x_t.
"""

from typing import Literal

import torch
from torch import Tensor

from latentdiff.diffusion.process import Coefficient

Prediction = Literal["eps", "x0", "v", "score", "flow"]


def to_x0(
    prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient
) -> Tensor:
    """x_0 as the network's output implies it.

    Args:
        prediction: the prediction type of `output`.
        output: [B, C, H, W].
        x_t: [B, C, H, W], not scaled for the network.
        alpha: scale of the data in x_t.
        sigma: standard deviation of the noise in x_t.

    Returns:
        [B, C, H, W].
    """
    if prediction == "x0":
        return output
    if prediction == "v":
        power = alpha**2 + sigma**2
        return _scale(alpha / power, x_t) - _scale(sigma / power**0.5, output)
    if prediction == "flow":
        return _scale(1 / (alpha + sigma), x_t) - _scale(sigma / (alpha + sigma), output)
    inverse = _inverse(alpha)
    if prediction == "eps":
        return _scale(inverse, x_t) - _scale(sigma * inverse, output)
    return _scale(inverse, x_t) + _scale(sigma**2 * inverse, output)


def target(
    prediction: Prediction, x0: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient
) -> Tensor:
    """Compute the training target of a network for x_t = alpha x0 + sigma noise.

    Args:
        prediction: the prediction type of the network.
        x0: [B, C, H, W].
        noise: [B, C, H, W].
        alpha: scale of the data in x_t.
        sigma: standard deviation of the noise in x_t.

    Returns:
        [B, C, H, W]; for "score" 0 where sigma is 0.
    """
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    if prediction == "v":
        root = (alpha**2 + sigma**2) ** 0.5
        return _scale(alpha / root, noise) - _scale(sigma / root, x0)
    if prediction == "flow":
        return noise - x0
    return _scale(-_inverse(sigma), noise)


def _scale(coefficient: Coefficient, x: Tensor) -> Tensor:
    """coefficient * x in the precision of x: a float64 coefficient must not promote it."""
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.to(x.dtype)
    return coefficient * x


def _inverse(value: Coefficient) -> Coefficient:
    """1 / value, and 0 for 0."""
    if isinstance(value, Tensor):
        return torch.where(value == 0, 0.0, 1 / value)
    return 1 / value if value else 0.0

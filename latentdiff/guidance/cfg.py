"""Classifier-free guidance: towards one condition and away from another."""

import math

import torch
from torch import Tensor

from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import Branch, ConditionedDenoiser, Denoiser, Estimate, bind
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError, check_finite


def classifier_free(
    denoise: ConditionedDenoiser,
    positive: Condition,
    negative: Condition | None,
    *,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, math.inf),
    blind: Condition | None = None,
    image_scale: float = 1.0,
) -> Denoiser:
    """Guide a denoiser: x_0 = negative + scale (positive - negative).

    Ho & Salimans 2022 (Classifier-Free Diffusion Guidance), eq. 6, with their 1 + w called scale:
    1 is off, and then (as outside the interval) only the positive condition is evaluated. Guiding
    x_0 is guiding eps, v or flow, for all are affine in each other at one level. A learned variance
    is the positive condition's own, as GLIDE and DiT take it.

    With a picture in the conditions, image_scale (negative - blind) more than image_scale 1 is
    added: Brooks et al. 2023 (InstructPix2Pix), eq. 3, whose s_T is scale and s_I image_scale. All
    three go through the network as one batch. (diffusers turns both off where scale <= 1 or
    image_scale < 1; here each is off at 1 alone.)

    Args:
        denoise: the denoiser to guide.
        positive: what the pictures shall show, for B pictures.
        negative: what they shall not, or the empty condition, for B pictures.
        scale: strength.
        rescale: phi of Lin et al. 2024, eq. 15-16, in 0..1: how much of the contrast that guidance
            adds to a picture's x_0 is taken back. (There and in diffusers it acts on the
            network's own output; x_0 is where over-exposure shows, whatever the network predicts.)
        interval: guide only where low < sigma / alpha <= high: Kynkäänniemi et al. 2024, eq. 6,
            whose sigma is sigma / alpha on any process.
        blind: the negative condition without the picture, for B pictures; None where image_scale
            is 1.
        image_scale: how closely to keep to the picture.

    Raises:
        UserError: a condition that a scale other than 1 needs is missing; rescale or interval out
            of range; conditions of different shapes.
    """
    low, high = bounds(interval)
    if not 0 <= rescale <= 1:
        raise UserError(f"guidance rescale must lie between 0 and 1, not {rescale}.")
    check_finite(scale, "guidance scale")
    check_finite(image_scale, "image guidance scale")
    unguided = bind(denoise, positive)
    if scale == image_scale == 1:
        return unguided
    if negative is None:
        raise UserError(f"guidance at scale {scale} needs a negative (or empty) condition.")
    if image_scale != 1 and blind is None:
        raise UserError(f"guidance at image scale {image_scale} needs a condition without it.")
    branches = [Branch("negative", negative), Branch("positive", positive)]
    if blind is not None and image_scale != 1:
        branches.append(Branch("blind", blind))

    def guided(x: Tensor, level: NoiseLevel) -> Estimate:
        if not low < level.ratio <= high:
            return unguided(x, level)
        away, towards, *without = denoise(x, level, branches)
        x0 = away.x0 + scale * (towards.x0 - away.x0)
        if without:
            x0 = x0 + (image_scale - 1) * (away.x0 - without[0].x0)
        return towards.with_x0(_restore_contrast(x0, towards.x0, rescale) if rescale else x0)

    return guided


def bounds(interval: tuple[float, float]) -> tuple[float, float]:
    """Check an interval of sigma / alpha, and return it.

    Raises:
        UserError: it is not two numbers with 0 <= low <= high.
    """
    try:
        low, high = (float(end) for end in interval)
        if 0 <= low <= high:
            return low, high
    except (TypeError, ValueError):
        pass
    raise UserError(
        "a guidance interval is two numbers, from a small sigma to a large one, not "
        f"{interval!r:.80}."
    )


def _restore_contrast(x0: Tensor, like: Tensor, rescale: float) -> Tensor:
    """Lin et al. 2024, eq. 15-16: each picture's standard deviation back to that of `like`."""
    axes = tuple(range(1, x0.ndim))
    std = x0.std(axes, correction=0, keepdim=True).clamp(min=torch.finfo(x0.dtype).tiny)
    factor = like.std(axes, correction=0, keepdim=True) / std
    return x0 * (1 + rescale * (factor - 1))

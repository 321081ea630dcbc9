"""Dynamic thresholding of the estimate."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser, Estimate
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError


def thresholded(denoise: Denoiser, *, quantile: float = 0.995, at_least: float = 1.0) -> Denoiser:
    """Dynamic thresholding: Saharia et al. 2022 (Imagen), section 2.3, around any denoiser.

    Each picture's x_0 is clipped to +-s and scaled by at_least / s, s the quantile of its |x_0|,
    but not below `at_least`: 1 for pixels in [-1, 1], more for latents.

    Raises:
        UserError: a quantile outside 0..1, or a bound that is not positive.
    """
    _check(quantile, at_least)

    def guided(x: Tensor, level: NoiseLevel) -> Estimate:
        estimate = denoise(x, level)
        x0 = estimate.x0
        bound = x0.abs().flatten(1).quantile(quantile, dim=1).clamp(min=at_least)
        bound = bound.view(-1, *[1] * (x0.ndim - 1))
        clipped = torch.minimum(torch.maximum(x0, -bound), bound)
        return estimate.with_x0(clipped * (at_least / bound))

    return guided


@dataclass(frozen=True, slots=True)
class DynamicThresholding:
    """Clip and rescale each picture's estimate: see `thresholded`.

    Attributes:
        quantile: quantile of |x_0| in a picture, 0..1.
        at_least: the bound below which nothing is clipped. Standard latents reach 3 or 4.

    Raises:
        UserError: see `thresholded`.
    """

    quantile: float = 0.995
    at_least: float = 3.0

    def __post_init__(self) -> None:
        _check(self.quantile, self.at_least)

    def denoiser(self, denoise: Denoiser) -> Denoiser:
        """See `EditsDenoiser`."""
        return thresholded(denoise, quantile=self.quantile, at_least=self.at_least)


def _check(quantile: float, at_least: float) -> None:
    if not 0 < quantile <= 1 or not 0 < at_least < math.inf:
        raise UserError(
            f"thresholding needs a quantile within 0..1 and a bound above 0, "
            f"not {quantile} and {at_least}."
        )

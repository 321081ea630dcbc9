"""Away from what the same network says with its attention spoilt (PAG, SEG)."""

import math

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import ASK_TOGETHER, POSITIVE, Condition, ConditionedDenoiser
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError

SPOILT = "spoilt"
"""In a condition: int64 [B], by which of the network's perturbations a row is spoilt; 0: none."""


def perturbed(
    denoise: ConditionedDenoiser,
    perturbation: int,
    pictures: int,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, math.inf),
) -> ConditionedDenoiser:
    """Add scale (x_0 - x_0 spoilt) to the estimates under every condition of a picture.

    Ahn et al. 2024 (PAG), eq. 11, and Hong 2024 (SEG), eq. 12, with their scale (0 is off). The
    spoilt rows go through the network in the batch of the others. What guidance makes of several
    estimates are sums with weights of total 1, and so exactly this term arrives in what is
    guided: eps = eps_cfg + scale (eps - eps spoilt). (Of projected guidance the direction that it
    projects along is that of the shifted x_0.) Of several positive conditions the mean is added.

    Args:
        denoise: the network's own; the guidance goes around what is returned. Its conditions are
            `mark`ed, and it does to rows of `SPOILT` what they say.
        perturbation: number of the perturbation, from 1.
        pictures: B; a batch holds one or more conditions for each.
        scale: strength.
        interval: only where low < sigma / alpha <= high.

    Raises:
        UserError: a scale or an interval out of range; in the run, a method of guidance that asks
            its conditions one by one.
    """
    low, high = interval
    if not math.isfinite(scale) or not 0 <= low <= high:
        raise UserError(
            f"perturbed attention needs a finite scale and an interval from a small sigma to a "
            f"large one, not {scale} and {interval}."
        )

    def shifted(x: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        if scale == 0 or not low < level.ratio <= high:
            return denoise(x, level, condition)
        rows = condition[POSITIVE].nonzero().flatten()
        if not len(rows):
            raise UserError(ASK_TOGETHER)
        joined = {name: torch.cat([part, part[rows]]) for name, part in condition.items()}
        joined[POSITIVE][len(x) :] = False  # another perturbation leaves these rows alone
        spoilt = condition.get(SPOILT, torch.zeros(len(x), dtype=torch.int64))
        joined[SPOILT] = torch.cat([spoilt, torch.full((len(rows),), perturbation)])
        x0, x0_spoilt = denoise(torch.cat([x, x[rows]]), level, joined).split([len(x), len(rows)])
        away = (x0[rows] - x0_spoilt).view(-1, pictures, *x.shape[1:]).mean(0)
        return x0 + scale * away.repeat(len(x) // pictures, *[1] * (x.ndim - 1))

    return shifted

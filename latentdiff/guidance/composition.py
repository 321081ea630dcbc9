"""Further prompts, each with its weight, beside the one that is guided to: a product of experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import ASK_TOGETHER, POSITIVE, Condition, ConditionedDenoiser
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError


def composed(
    denoise: ConditionedDenoiser, further: Sequence[tuple[Condition, float]]
) -> ConditionedDenoiser:
    """The estimate under the positive condition becomes positive + sum_i w_i (x_0i - negative).

    Classifier-free guidance of scale s makes of it negative + s (positive - negative) +
    sum_i s w_i (x_0i - negative): Liu et al. 2022 (Composable Diffusion), eq. 11, with weights of s
    and s w_i. So it goes with every guidance. All rows go through the network as one batch. Where
    no negative condition is asked, guidance is off, and the further ones are, too.

    Args:
        denoise: to guide; the guidance goes around what is returned. Its conditions are `mark`ed;
            of several that are not positive, the one before or after it is its negative.
        further: conditions for B pictures, with what the positive one has beside them left out,
            and their weights.
    """
    if not further:
        return denoise

    def shifted(x: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        positive = condition[POSITIVE]
        if not positive.any():
            raise UserError(ASK_TOGETHER)
        if bool(positive.all()):
            return denoise(x, level, condition)
        rows, others = (which.nonzero().flatten() for which in (positive, ~positive))
        joined = dict(condition)
        for name, part in condition.items():
            more = [each.get(name, part[rows]) for each, _ in further]
            joined[name] = torch.cat([part, *more])
        joined[POSITIVE][len(x) :] = False
        count = len(further)
        batch = torch.cat([x, *[x[rows]] * count])
        x0, *each_x0 = denoise(batch, level, joined).split([len(x), *[len(rows)] * count])
        base = x0[others[: len(rows)]]
        total = x0[rows]
        for (_, weight), more_x0 in zip(further, each_x0, strict=True):
            total = total + weight * (more_x0 - base)
        return x0.index_copy(0, rows.to(x0.device), total)

    return shifted

"""Several conditions through a network as one batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Condition, ConditionedDenoiser
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError


def together(
    denoise: ConditionedDenoiser, conditions: Sequence[Condition]
) -> Callable[[Tensor, NoiseLevel], tuple[Tensor, ...]]:
    """Denoise under each condition, in one call of the network.

    Args:
        denoise: the denoiser to guide.
        conditions: K conditions for the same B pictures, with the same names and shapes. They are
            joined once, here, not at each step.

    Returns:
        (x [B, C, H, W], level) -> K estimates of x_0 [B, C, H, W], in the order of conditions.

    Raises:
        UserError: the conditions differ in their names or shapes.
    """
    shapes = [{name: value.shape for name, value in each.items()} for each in conditions]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError(
            f"conditions of one call must have the same names and shapes, not {shapes}."
        )
    joined = {name: torch.cat([each[name] for each in conditions]) for name in conditions[0]}
    count = len(conditions)

    def estimates(x: Tensor, level: NoiseLevel) -> tuple[Tensor, ...]:
        return denoise(torch.cat([x] * count), level, joined).chunk(count)

    return estimates

"""Further prompts, each with its weight, beside the one that is guided to: a product of experts."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import interpolate

from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import Branch, ConditionedDenoiser, Estimate
from latentdiff.diffusion.process import NoiseLevel


def composed(
    denoise: ConditionedDenoiser,
    further: Sequence[tuple[Condition, float | Tensor]],
    negative: Condition,
    weight: float | Tensor = 1.0,
) -> ConditionedDenoiser:
    """Move the estimate under the positive condition to positive + sum_i w_i (x_0i - negative).

    With a weight w of the positive condition itself, it is negative + w (positive - negative) + ...

    Classifier-free guidance of scale s makes of it negative + s (positive - negative) +
    sum_i s w_i (x_0i - negative): Liu et al. 2022 (Composable Diffusion), eq. 11, with weights of s
    and s w_i. With noise the sum is the score of no distribution (Du et al. 2023, Reduce, Reuse,
    Recycle), and what a model never shows together comes out blurred. It goes with every guidance,
    and without any. All rows go through the network as one batch; the negative condition is asked
    here where the guidance does not ask it.

    Args:
        denoise: to guide; the guidance goes around what is returned.
        further: conditions for B pictures and their weights; a weight may be [B, 1, 1, 1], or a
            function of place, [1, 1, H, W] at any resolution, which is averaged to that of x.
        negative: for B pictures, where the guidance has none.
        weight: of the positive condition.
    """
    own = isinstance(weight, Tensor) or weight != 1
    if not further and not own:
        return denoise
    others = [Branch("further", condition) for condition, _ in further]
    origin = Branch("negative", negative)

    def shifted(x: Tensor, level: NoiseLevel, branches: Sequence[Branch]) -> tuple[Estimate, ...]:
        roles = [branch.role for branch in branches]
        if "positive" not in roles:
            return denoise(x, level, branches)
        alone = [] if "negative" in roles else [origin]
        found = denoise(x, level, [*branches, *alone, *others])
        estimates, more = list(found[: len(branches)]), found[len(found) - len(others) :]
        base = found[len(branches) if alone else roles.index("negative")].x0
        place = roles.index("positive")
        x0 = estimates[place].x0
        x0 = base + _at(weight, x) * (x0 - base) if own else x0
        for (_, each), estimate in zip(further, more, strict=True):
            x0 = x0 + _at(each, x) * (estimate.x0 - base)
        estimates[place] = estimates[place].with_x0(x0)
        return tuple(estimates)

    return shifted


def _at(weight: float | Tensor, x: Tensor) -> float | Tensor:
    """A weight at the places of x [B, C, h, w]."""
    if not isinstance(weight, Tensor):
        return weight
    return interpolate(weight.to(x), size=x.shape[-2:], mode="area")

"""Guidance by the model's own attention, spoilt: PAG and SEG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from latentdiff.diffusion.denoiser import Branch, ConditionedDenoiser, Estimate
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError, check_finite
from latentdiff.guidance.cfg import bounds
from latentdiff.models.perturbation import MID, BlurredQueries, IdentityAttention, Perturbation


def perturbed(
    denoise: ConditionedDenoiser,
    number: int,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, math.inf),
) -> ConditionedDenoiser:
    """Add scale (x_0 - x_0 spoilt) to the estimates under every condition of a picture.

    Ahn et al. 2024 (PAG), eq. 11, and Hong 2024 (SEG), eq. 12, with their scale (0 is off). The
    spoilt branch goes through the network in the batch of the others. What guidance makes of
    several estimates are sums with weights of total 1, and so exactly this term arrives in what is
    guided: eps = eps_cfg + scale (eps - eps spoilt). (Of projected guidance the direction that it
    projects along is that of the shifted x_0.)

    Args:
        denoise: the network's own; the guidance goes around what is returned.
        number: number of the network's perturbation, from 1.
        scale: strength.
        interval: only where low < sigma / alpha <= high.

    Raises:
        UserError: a scale or an interval out of range; in the run, a method of guidance that asks
            its conditions one by one.
    """
    low, high = bounds(interval)
    check_finite(scale, "perturbed attention: scale")
    known: dict[int, tuple[Branch, Branch]] = {}  # so that each step asks the same branches

    def spoilt_of(branches: Sequence[Branch]) -> Branch:
        positive = next((b for b in branches if b.role == "positive" and not b.perturbation), None)
        if positive is None:
            raise UserError(
                "perturbed attention needs a guidance that asks all its conditions in one call of "
                "the denoiser."
            )
        if id(positive) not in known:
            known.clear()
            spoilt = Branch("further", positive.condition, number)
            known[id(positive)] = positive, spoilt
        return known[id(positive)][1]

    def shifted(x: Tensor, level: NoiseLevel, branches: Sequence[Branch]) -> tuple[Estimate, ...]:
        if scale == 0 or not low < level.ratio <= high:
            return denoise(x, level, branches)
        *estimates, spoilt = denoise(x, level, [*branches, spoilt_of(branches)])
        place = next(n for n, branch in enumerate(branches) if branch.role == "positive")
        away = scale * (estimates[place].x0 - spoilt.x0)
        return tuple(estimate.with_x0(estimate.x0 + away) for estimate in estimates)

    return shifted


@dataclass(frozen=True, slots=True)
class PAG:
    """Perturbed-attention guidance: Ahn et al. 2024.

    Attributes:
        scale: strength; 0 is off, 3 their choice.
        layers: prefixes of the names of the layers to spoil.
        interval: range of sigma / alpha, above the first and up to the second.
    """

    scale: float = 3.0
    layers: tuple[str, ...] = MID
    interval: tuple[float, float] = (0.0, math.inf)

    @property
    def perturbation(self) -> Perturbation:
        """See `EditsBranches`."""
        return IdentityAttention(self.layers)

    def branches(self, denoise: ConditionedDenoiser, number: int) -> ConditionedDenoiser:
        """See `EditsBranches`."""
        return perturbed(denoise, number, scale=self.scale, interval=self.interval)


@dataclass(frozen=True, slots=True)
class SEG:
    """Smoothed-energy guidance: Hong 2024.

    Attributes:
        scale: strength; 0 is off, 3 their choice.
        blur: standard deviation of the blur of the queries, in places of the layer's grid.
        layers: prefixes of the names of the layers to spoil.
        interval: range of sigma / alpha, above the first and up to the second.

    Raises:
        UserError: a blur that is not above 0.
    """

    scale: float = 3.0
    blur: float = math.inf
    layers: tuple[str, ...] = MID
    interval: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        if not self.blur > 0:
            raise UserError(f"the blur of SEG must be above 0, not {self.blur}.")

    @property
    def perturbation(self) -> Perturbation:
        """See `EditsBranches`."""
        return BlurredQueries(self.blur, self.layers)

    def branches(self, denoise: ConditionedDenoiser, number: int) -> ConditionedDenoiser:
        """See `EditsBranches`."""
        return perturbed(denoise, number, scale=self.scale, interval=self.interval)

"""Guidance by the model's own attention, spoilt: PAG and SEG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from latentdiff.diffusion.denoiser import ConditionedDenoiser
from latentdiff.errors import UserError
from latentdiff.guidance.perturbed_attention import perturbed
from latentdiff.models.perturbation import MID, BlurredQueries, IdentityAttention, Perturbation


@runtime_checkable
class SpoilsAttention(Protocol):
    """A guide away from what the network says with its self-attention spoilt."""

    @property
    def scale(self) -> float: ...

    @property
    def interval(self) -> tuple[float, float]: ...

    @property
    def perturbation(self) -> Perturbation: ...


@dataclass(frozen=True, slots=True)
class PAG:
    """Perturbed-attention guidance: Ahn et al. 2024.

    Attributes:
        scale: strength; 0 is off, 3 their choice.
        layers: how the names of the layers begin that are spoilt.
        interval: of sigma / alpha, above the first and up to the second.
    """

    scale: float = 3.0
    layers: tuple[str, ...] = MID
    interval: tuple[float, float] = (0.0, math.inf)

    @property
    def perturbation(self) -> Perturbation:
        return IdentityAttention(self.layers)


@dataclass(frozen=True, slots=True)
class SEG:
    """Smoothed-energy guidance: Hong 2024.

    Attributes:
        scale: strength; 0 is off, 3 their choice.
        blur: standard deviation of the blur of the queries, in places of the layer's grid.
        layers: how the names of the layers begin that are spoilt.
        interval: of sigma / alpha, above the first and up to the second.

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
        return BlurredQueries(self.blur, self.layers)


def spoil_attention(
    denoise: ConditionedDenoiser, guides: Sequence[SpoilsAttention], pictures: int
) -> ConditionedDenoiser:
    """The denoiser of a network that was made with the perturbations of `guides`, so guided.

    Args:
        denoise: the network's own.
        guides: in the order of the network's perturbations.
        pictures: B.
    """
    for number, guide in enumerate(guides, 1):
        denoise = perturbed(denoise, number, pictures, scale=guide.scale, interval=guide.interval)
    return denoise

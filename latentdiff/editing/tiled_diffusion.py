"""Diffusion in windows: pictures larger than a model's own, each part at the size that it knows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Branch, ConditionedDenoiser, Estimate
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.editing.run_context import Finish, RunContext, unchanged
from latentdiff.errors import UserError


@dataclass(frozen=True, eq=False)
class TiledDiffusion:
    """Bar-Tal et al. 2023 (MultiDiffusion), eq. 5: estimates of overlapping windows, averaged.

    The network sees windows of its own size, all under the same prompt, and x_0 at each place is
    the weighted mean of what it says of the windows there. Averages are taken of x_0 under each
    condition, before guidance, so every guidance and solver goes with it. A run that is no larger
    than a window is left alone.

    Args:
        overlap: the least share of a window's side that its neighbour also covers, 0..0.9.
        window: height and width of a window in latents; None: the model's own.

    Raises:
        UserError: a number out of range.
    """

    overlap: float = 0.5
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 0.9:
            raise UserError(f"tiled: an overlap lies between 0 and 0.9, not {self.overlap:g}.")
        if self.window is not None and min(self.window) < 1:
            raise UserError(f"tiled: a window has at least one latent a side, not {self.window}.")

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """See `Binds`."""
        return replace(self, window=self.window or context.native_size), unchanged

    def conditioned(self, denoise: ConditionedDenoiser) -> ConditionedDenoiser:
        """The denoiser of pictures of any size, out of one that is asked about windows."""
        window = self.window
        if window is None:
            raise UserError("TiledDiffusion needs a window: name one, or run it in the pipeline.")

        def averaged(
            x: Tensor, level: NoiseLevel, branches: Sequence[Branch]
        ) -> tuple[Estimate, ...]:
            sides = [min(most, side) for most, side in zip(window, x.shape[-2:], strict=True)]
            if list(x.shape[-2:]) == sides:
                return denoise(x, level, branches)
            starts = [
                window_starts(side, part, self.overlap)
                for side, part in zip(x.shape[-2:], sides, strict=True)
            ]
            weight = (_ramp(sides[0])[:, None] * _ramp(sides[1])).to(x)
            total = x.new_zeros(x.shape[-2:])
            sums: list[list[Tensor]] = []
            for top in starts[0]:
                for left in starts[1]:
                    place = slice(top, top + sides[0]), slice(left, left + sides[1])
                    part_of = _cropped(branches, place, (x.shape[-2], x.shape[-1]))
                    found = denoise(x[(..., *place)], level, part_of)
                    total[place] += weight
                    parts = [_parts(estimate) for estimate in found]
                    sums = sums or [[torch.zeros_like(x) for _ in each] for each in parts]
                    for whole, part in zip(sums, parts, strict=True):
                        for summed, values in zip(whole, part, strict=True):
                            summed[(..., *place)] += weight * values
            return tuple(Estimate(*(summed / total for summed in whole)) for whole in sums)

        return averaged


def _parts(estimate: Estimate) -> list[Tensor]:
    return [estimate.x0] + ([] if estimate.variance is None else [estimate.variance])


def _part(whole: Tensor, place: tuple[slice, slice], size: tuple[int, int]) -> Tensor:
    """The part of a map, of latents or a coarser one, that belongs to a window of latents.

    A window begins where that map has a place, or less than one behind it.
    """
    parts: list[slice] = []
    for each, side, own in zip(place, size, whole.shape[-2:], strict=True):
        times = next(2**k for k in range(side) if -(-side // 2**k) == own)
        start = each.start // times
        parts.append(slice(start, start - (each.start - each.stop) // times))
    return whole[(..., *parts)]


def _cropped(
    branches: Sequence[Branch], place: tuple[slice, slice], size: tuple[int, int]
) -> Sequence[Branch]:
    """The branches of a window: what the network sees beside x, too, is of that place.

    Args:
        branches: of all latents.
        place: of the window.
        size: height and width of all latents.
    """
    conditions = [branch.condition for branch in branches]
    if all(each.beside is None and not each.control for each in conditions):
        return branches  # as they are, so that what was computed of them is found again
    cropped: list[Branch] = []
    for branch in branches:
        beside, hints = branch.condition.beside, branch.condition.control
        seen = None if beside is None else beside[(..., *place)]
        told = tuple(
            replace(hint, embedded=tuple(_part(one, place, size) for one in hint.embedded))
            for hint in hints
        )
        condition = replace(branch.condition, beside=seen, control=told)
        cropped.append(replace(branch, condition=condition))
    return cropped


def window_starts(side: int, window: int, overlap: float) -> list[int]:
    """Places where windows begin, evenly spaced from one border to the other."""
    room = side - window
    if room == 0:
        return [0]
    count = 1 + -(-room // max(1, int(window * (1 - overlap))))
    return [round(place * room / (count - 1)) for place in range(count)]


def _ramp(side: int) -> Tensor:
    """Weights along a side that fall from the middle to the borders, above 0."""
    places = torch.arange(side, dtype=torch.float64)
    return torch.minimum(places + 1, side - places)

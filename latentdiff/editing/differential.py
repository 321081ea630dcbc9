"""A strength for each place: what a soft mask says, from black, which stays, to white."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing.jumps import first_visits
from latentdiff.editing.masks import (
    check_mask,
    check_mask_size,
    composite,
    mask_tensor,
    open_mask,
    paste,
)
from latentdiff.editing.run_context import Finish, RunContext, opened, pixels, size_of, unchanged
from latentdiff.editing.sdedit import SDEdit
from latentdiff.errors import UserError
from latentdiff.pictures import Picture


@dataclass(frozen=True, eq=False)
class Differential:
    """Levin & Fried 2023 (Differential Diffusion), algorithm 1: SDEdit with a strength a place.

    Of a run of n steps a place is changed in the last int(n * strength * its grey); before, the
    noised picture is put back there after each step.

    Args:
        image: a picture, opened here; or latents [1 or B, C, h, w].
        mask: a picture of its size, in greys; or with latents [1 or B, 1, h, w] in [0, 1].
        strength: that of white, 0..1.

    Raises:
        UserError: a strength out of range, no picture, or a mask of another size.
    """

    image: Picture | Tensor
    mask: Picture | Tensor
    strength: float = 1.0
    _steps: dict[NoiseLevel, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(f"strength must lie above 0 and up to 1, not {self.strength}.")
        object.__setattr__(self, "image", opened(self.image))
        if isinstance(self.mask, Tensor) != isinstance(self.image, Tensor):
            raise UserError("give picture and mask both as pictures, or both as latents.")
        if isinstance(self.mask, Tensor):
            check_mask(self.mask)
            return
        mask = open_mask(self.mask)
        height, width = self.picture_size or (mask.height, mask.width)
        check_mask_size(mask, (width, height))
        object.__setattr__(self, "mask", mask)

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """See `HoldsPicture`."""
        return size_of(self.image)

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """See `HoldsPicture`. A latent has the strength of its strongest pixel."""
        if isinstance(self.image, Tensor):
            return self, unchanged
        picture, mask = pixels(self.image), mask_tensor(self.mask)
        factor = context.autoencoder.factor
        strengths = max_pool2d(context.pad(mask), factor)
        bound = replace(self, image=context.latents(picture), mask=strengths)

        def finish(painted: Tensor) -> Tensor:
            return paste(painted, picture, (bound._made(mask) > 0).to(mask.dtype), factor)

        return bound, finish

    def timetable(self, timetable: Timetable) -> Timetable:
        """The last steps of the run, as many as white takes part in."""
        steps = first_visits(timetable)
        self._steps.clear()
        self._steps.update({level: len(steps) - 1 - place for place, level in enumerate(steps)})
        return self._sdedit.timetable(timetable)

    def begin(self, x: Tensor, timetable: Timetable, noise: NoiseStreams) -> Tensor:
        """See `SDEdit.begin`."""
        return self._sdedit.begin(x, timetable, noise)

    def after(self, x: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor:
        """The noised picture put back where as many steps are left as a place takes part in, or
        more."""
        if level not in self._steps:  # between two steps of a solver that chooses its own
            return x
        assert isinstance(self.image, Tensor)
        assert isinstance(self.mask, Tensor)
        free = self._made(self.mask) > self._steps[level]
        return composite(x, self.image.to(x), free.to(self.mask.dtype), level, noise)

    def _made(self, mask: Tensor) -> Tensor:
        """Number of steps that each place takes part in."""
        # A hair more: float32 has 0.3 * 10 below 3.
        return torch.floor((len(self._steps) - 1) * self.strength * mask + 1e-4)

    @property
    def _sdedit(self) -> SDEdit:
        return SDEdit(self.image, self.strength)

"""RePaint and plain replacement: the known part of a picture is put back after each step."""

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing.jumps import with_jumps
from latentdiff.editing.masks import (
    check_mask,
    composite,
    constrains_nothing,
    fill,
    latent_mask,
    mask_for,
    mask_like,
    mask_tensor,
    paste,
)
from latentdiff.editing.run_context import (
    Finish,
    RunContext,
    latents_like,
    opened,
    pixels,
    size_of,
    unchanged,
)
from latentdiff.errors import UserError
from latentdiff.pictures import Picture

# The paper resamples 10 of its 250 steps at a time (Lugmayr et al. 2022, section 5.1).
_PAPER_JUMP = 10 / 250


@dataclass(frozen=True, eq=False)
class Hole:
    """A picture with a hole to paint, both checked.

    Args:
        image: the picture, opened here; or latents [1 or B, C, h, w].
        mask: what to paint: white (1), all of it; grey of one half or more, mixed with the
            picture in the end; what is darker stays. A picture of the same size; None for what is
            transparent in `image`; with latents [1 or B, 1 or C, h, w] in [0, 1].

    Raises:
        UserError: no picture, no mask, a mask of another size, or one that differs from the
            transparent parts of the picture.
    """

    image: Picture | Tensor
    mask: Picture | Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.mask, Tensor) and isinstance(self.image, Tensor):
            opened(self.image)
            check_mask(self.mask)
            return
        if isinstance(self.mask, Tensor) or isinstance(self.image, Tensor):
            raise UserError("give picture and mask both as pictures, or both as latents.")
        mask = mask_for(self.image, self.mask)
        object.__setattr__(self, "image", opened(self.image))
        object.__setattr__(self, "mask", mask_like(mask, self.image))

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """See `HoldsPicture`."""
        return size_of(self.image)


@dataclass(frozen=True, eq=False)
class Blend(Hole):
    """Plain replacement: Song et al. 2021 (Score-Based Generative Modeling), appendix I.2.

    After each step the known region is put back at the new level, with fresh noise. In the end the
    known pixels are the picture's own, bit for bit, and the seam lies in the hole.

    Args:
        image: see `Hole`.
        mask: see `Hole`.

    Raises:
        UserError: see `Hole`.
    """

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """See `HoldsPicture`. The hole is filled with its surroundings before it is encoded."""
        if isinstance(self.image, Tensor):
            return self, unchanged
        picture, mask = pixels(self.image), mask_tensor(self.mask)
        latents = context.latents(fill(picture, mask))
        # The mask stays on the CPU: `composite` looks into it at each step.
        factor = context.autoencoder.factor
        bound = replace(self, image=latents, mask=latent_mask(context.pad(mask), factor))
        return bound, lambda painted: paste(painted, picture, mask, factor)

    def after(self, x: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor:
        """The known region put back; see `composite`."""
        assert isinstance(self.mask, Tensor)
        return composite(x, latents_like(self.image, x), self.mask, level, noise)


@dataclass(frozen=True, eq=False)
class RePaint(Blend):
    """Lugmayr et al. 2022 (RePaint), algorithm 1: `Blend`, and jumps back up to harmonise.

    Args:
        image: see `Hole`.
        mask: see `Hole`.
        jump_length: how many steps a jump goes back up. None: the paper's 10 of 250 steps, scaled
            to the length of the run.
        resamples: how often each stretch is gone through; 1 is `Blend`.
        start: the part of the run, from its end, in which there are jumps: 0..1.

    Raises:
        UserError: see `Hole`; or a number out of range.
    """

    jump_length: int | None = None
    resamples: int = 10
    start: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jump_length is not None and self.jump_length < 1:
            raise UserError(f"jump_length must be at least 1, not {self.jump_length}.")
        if self.resamples < 1:
            raise UserError(f"resamples must be at least 1, not {self.resamples}.")
        if not 0 <= self.start <= 1:
            raise UserError(f"start must lie between 0 and 1, not {self.start}.")

    def timetable(self, timetable: Timetable) -> Timetable:
        """The timetable with the paper's jumps, one for the batch; unchanged where nothing is known
        of any picture."""
        if isinstance(self.mask, Tensor) and constrains_nothing(self.mask):
            return timetable
        steps = len(timetable) - 1
        scaled = max(1, round(_PAPER_JUMP * steps))
        return with_jumps(timetable, self.jump_length or scaled, self.resamples, self.start)

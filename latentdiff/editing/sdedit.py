"""SDEdit: a run that starts late, from the noised picture."""

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing.jumps import first_visits
from latentdiff.editing.masks import (
    check_mask,
    composite,
    latent_mask,
    mask_like,
    mask_tensor,
    open_mask,
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


@dataclass(frozen=True, eq=False)
class SDEdit:
    """Meng et al. 2022 (SDEdit), algorithms 1 to 4: noise a guide, and go back from there.

    Args:
        image: the guide, a photo or strokes: a picture, or latents [1 or B, C, h, w]. A picture
            is opened here.
        strength: 0..1. Of a run of n steps the last int(n * strength) are made; 0 returns the
            guide itself, 1 ignores it.
        repeats: K, how often the whole is done, each time on the last result, with fresh noise.
        mask: where the guide may be changed (white, 1); elsewhere its pixels stay as they are. A
            picture of its size; or, with latents, [1 or B, 1 or C, h, w] in [0, 1].

    Raises:
        UserError: a number out of range, no picture, or a mask of another size.
    """

    image: Picture | Tensor
    strength: float
    repeats: int = 1
    mask: Picture | Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength must lie between 0 and 1, not {self.strength}.")
        if self.repeats < 1:
            raise UserError(f"repeats must be at least 1, not {self.repeats}.")
        object.__setattr__(self, "image", opened(self.image))
        if isinstance(self.mask, Tensor) and not isinstance(self.image, Tensor):
            raise UserError("give picture and mask both as pictures, or both as latents.")
        if isinstance(self.mask, Tensor) and isinstance(self.image, Tensor):
            check_mask(self.mask)
        if self.mask is not None and not isinstance(self.mask, Tensor):
            object.__setattr__(self, "mask", mask_like(open_mask(self.mask), self.image))

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """See `HoldsPicture`."""
        return size_of(self.image)

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """See `HoldsPicture`."""
        if isinstance(self.image, Tensor):
            return self, unchanged
        picture = pixels(self.image)
        latents = context.latents(picture)
        if self.strength == 0:
            return replace(self, image=latents, mask=None), lambda p: picture.to(p).expand_as(p)
        if self.mask is None:
            return replace(self, image=latents), unchanged
        mask = mask_tensor(self.mask)
        factor = context.autoencoder.factor
        bound = replace(self, image=latents, mask=latent_mask(context.pad(mask), factor))
        return bound, lambda painted: paste(painted, picture, mask, factor)

    def timetable(self, timetable: Timetable) -> Timetable:
        """The last steps of the run, `repeats` times; the loop jumps back up in between."""
        steps = first_visits(timetable)
        made = int((len(steps) - 1) * self.strength)
        if made == 0 and self.strength > 0:
            raise UserError(
                f"strength {self.strength} of {len(steps) - 1} steps is less than one step: take "
                "more of either."
            )
        start = steps[-1 - made]
        late = timetable[timetable.index(start) :]
        late = [level for level in late if level.log_snr >= start.log_snr]
        return late * (self.repeats if made else 1)

    def begin(self, x: Tensor, timetable: Timetable, noise: NoiseStreams) -> Tensor:
        """Song et al. 2021, the forward process at the start: alpha * image + sigma * noise."""
        if self.strength == 1:
            return x
        start, image = timetable[0], self._latents(x)
        if start.sigma == 0:
            return image.expand_as(x).clone()
        return start.alpha * image + start.sigma * noise.like(x)

    def after(self, x: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor:
        """Meng et al. 2022, algorithm 3: outside the mask the guide stays."""
        if self.mask is None:
            return x
        assert isinstance(self.mask, Tensor)
        return composite(x, self._latents(x), self.mask, level, noise)

    def _latents(self, x: Tensor) -> Tensor:
        return latents_like(self.image, x)

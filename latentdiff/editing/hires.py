"""The high-resolution pass: a run that goes on with its own picture, enlarged."""

from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor
from torch.nn.functional import interpolate

from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing.jumps import first_visits
from latentdiff.editing.run_context import Finish, RunContext, padded_size, unchanged
from latentdiff.errors import UserError

_MOST = 1000  # steps of a timetable


@dataclass(frozen=True, eq=False)
class Hires:
    """Draw at the run's size, enlarge the picture, and draw the last steps again: SDEdit of itself.

    A model composes a picture at the size that it was trained on, and adds detail at a larger one:
    Meng et al. 2022 (SDEdit), algorithm 1, with the enlarged picture as its guide. Both passes are
    one run, so every solver and guidance goes with it; an edit that holds a picture does not, but
    for SDEdit without a mask. A model that is told sizes is told those of the first pass.

    Args:
        factor: how many times larger, above 1 and up to 8; sides are rounded up to multiples of the
            autoencoder's factor.
        strength: of the second pass, above 0 and up to 1: the last int(n * strength) of n steps are
            made again. Small ones sharpen, large ones invent.
        steps: of the second pass, as A1111 counts them: the last so many of int(steps / strength).
            None makes the run's own steps again.
        context: the run; the pipeline puts it there.

    Raises:
        UserError: a number out of range.
    """

    factor: float
    strength: float = 0.5
    steps: int | None = None
    context: RunContext | None = None
    _end: list[NoiseLevel] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 < self.factor <= 8:
            raise UserError(f"hires: enlarge more than 1 and up to 8 times, not {self.factor:g}.")
        if not 0 < self.strength <= 1:
            raise UserError(f"hires: a strength is above 0 and up to 1, not {self.strength:g}.")
        if self.steps is not None and not 1 <= self.steps <= _MOST * self.strength:
            raise UserError(
                f"hires: {self.steps} steps at a strength of {self.strength:g}: at least 1 is "
                f"needed, and at most {int(_MOST * self.strength)} are made."
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the second pass."""
        context = self._context
        height, width = (round(side * self.factor) for side in context.padded)
        return padded_size((height, width), context.autoencoder.factor)

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """See `Binds`."""
        return replace(self, context=context), unchanged

    def timetable(self, timetable: Timetable) -> Timetable:
        """The levels, and the last of them once more; the loop jumps back up in between."""
        steps = first_visits(timetable)
        if self.steps is not None:
            self._end[:] = steps[-1:]
            return [*timetable, *self._finer(self.steps)]
        made = int((len(steps) - 1) * self.strength)
        if made == 0:
            raise UserError(
                f"hires: strength {self.strength} of {len(steps) - 1} steps is less than one step: "
                "take more of either."
            )
        self._end[:] = steps[-1:]
        return [*timetable, *steps[-1 - made :]]

    def _finer(self, steps: int) -> Timetable:
        """The levels of a second pass of its own number of steps."""
        if self._context.levels is None:
            raise UserError("hires: steps: a timetable given level by level has no other number.")
        return self._context.levels(int(steps / self.strength))[-1 - steps :]

    def after(self, x: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor:
        """The picture enlarged at the end of the first pass; its pixels, not its latents, which
        mean nothing between two places."""
        context = self._context
        factor = context.autoencoder.factor
        small = tuple(side // factor for side in context.padded)
        if level not in self._end or x.shape[-2:] != small:
            return x
        picture = context.autoencoder.decode(x)
        large = interpolate(picture, size=self.size, mode="bicubic", align_corners=False)
        return context.autoencoder.encode(large.clamp(-1, 1)).to(x)

    @property
    def _context(self) -> RunContext:
        if self.context is None:
            raise UserError("Hires needs an autoencoder: run it in the pipeline.")
        return self.context

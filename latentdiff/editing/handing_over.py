"""A run in two parts: one model draws down to a noise level, another goes on from there.

So a base and a refiner of Stable Diffusion XL work together (Podell et al. 2023, sec. 2.5; an
ensemble of expert denoisers in diffusers).
"""

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import DiscreteVP, Process
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing.run_context import Finish, RunContext, latents_like, opened, unchanged
from latentdiff.errors import UserError


@dataclass(frozen=True, eq=False)
class DenoisingEnd:
    """End a run early: its output is still noisy, so take `output_type="latent"`.

    Args:
        at: 0..1, the part of the process's times that is walked through; 1 is all.

    Raises:
        UserError: it is not between 0 and 1.
    """

    at: float
    _cutoff: float | None = None

    def __post_init__(self) -> None:
        _check(self.at, "DenoisingEnd")

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """See `Binds`."""
        return replace(self, _cutoff=_cutoff(context.process, self.at)), unchanged

    def timetable(self, timetable: Timetable) -> Timetable:
        """The steps that begin at or above the level; the last of them goes below it."""
        return timetable[: _steps_above(timetable, self._cutoff) + 1]


@dataclass(frozen=True, eq=False)
class DenoisingStart:
    """Begin a run late, from what another one with `DenoisingEnd` left: the rest of its steps.

    Both runs have the same number of steps and the same timetable.

    Args:
        latents: of that run's output, [1 or B, C, h, w].
        at: as there.

    Raises:
        UserError: `at` is not between 0 and 1, or there are no latents.
    """

    latents: Tensor
    at: float
    _cutoff: float | None = None

    def __post_init__(self) -> None:
        _check(self.at, "DenoisingStart")
        if not isinstance(self.latents, Tensor):
            raise UserError(
                f"DenoisingStart: latents must be a torch.Tensor, not {type(self.latents).__name__}"
                "; a picture goes to SDEdit."
            )
        opened(self.latents)

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """See `Binds`."""
        return replace(self, _cutoff=_cutoff(context.process, self.at)), unchanged

    def timetable(self, timetable: Timetable) -> Timetable:
        """The steps that begin below the level."""
        return timetable[_steps_above(timetable, self._cutoff) :]

    def begin(self, x: Tensor, timetable: Timetable, noise: NoiseStreams) -> Tensor:
        """The latents, which are at this level already."""
        return latents_like(self.latents, x).expand_as(x).clone()


def _check(at: float, name: str) -> None:
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 < at < 1:
        raise UserError(f"{name}: at must lie between 0 and 1, not {at!s:.40}.")


def _cutoff(process: Process | None, at: float) -> float:
    """The time at a part of the way from noise to data, a whole one of a discrete process."""
    if process is None:
        raise UserError("DenoisingEnd and DenoisingStart need a model: run them in the pipeline.")
    if isinstance(process, DiscreteVP):
        count = process.num_train_timesteps
        return float(round(count - at * count))
    return process.t_max - at * (process.t_max - process.t_min)


def _steps_above(timetable: Timetable, cutoff: float | None) -> int:
    """The number of steps that begin at or above a time.

    Raises:
        UserError: none does, or all do, so that one of the two runs has no step.
    """
    if cutoff is None:
        raise UserError("DenoisingEnd and DenoisingStart need a model: run them in the pipeline.")
    steps = len(timetable) - 1
    count = sum(level.t >= cutoff for level in timetable[:-1])
    if count in (0, steps):
        raise UserError(
            f"of {steps} steps {count} begin at or above t = {cutoff:g}, which leaves one of the "
            "two models without any: take more steps, or hand over elsewhere."
        )
    return count

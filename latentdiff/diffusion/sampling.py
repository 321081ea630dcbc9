"""THE loop: the only place where a run steps through a timetable."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser, LearnsVariance
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, transition
from latentdiff.diffusion.solver import ChoosesSteps, Solver
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError


@runtime_checkable
class EditsTimetable(Protocol):
    """An edit that changes which levels are visited (SDEdit drops the first, RePaint jumps)."""

    def timetable(self, timetable: Timetable) -> Timetable: ...


@runtime_checkable
class EditsBegin(Protocol):
    """An edit that changes where the run begins: x [B, C, H, W] at timetable[0]."""

    def begin(self, x: Tensor, timetable: Timetable, noise: NoiseStreams) -> Tensor: ...


@runtime_checkable
class EditsAfter(Protocol):
    """An edit that corrects x [B, C, H, W] after each step towards the data, at its new level."""

    def after(self, x: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor: ...


@runtime_checkable
class EditsDenoiser(Protocol):
    """An edit that corrects each estimate of x_0, as guidance does (ILVR in pixels)."""

    def denoiser(self, denoise: Denoiser) -> Denoiser: ...


@runtime_checkable
class EditsInput(Protocol):
    """An edit that shows the network more than x [B, C, H, W] (`Inpaint`, `Instruct`).

    This is part of the condition, which guidance takes, and so known before the run: the pipeline
    asks for it, and `sample` only passes the edit.
    """

    @property
    def image_guidance_scale(self) -> float:
        """How strongly to guide by what is shown: see `classifier_free`; 1 is off."""
        ...

    def beside(self, x: Tensor) -> Tensor:
        """[B, extra, H, W], behind the channels of x in the network's input."""
        ...


Edit = EditsTimetable | EditsBegin | EditsAfter | EditsDenoiser | EditsInput
"""Any object with at least one of the five touch points."""

Callback = Callable[[int, NoiseLevel, Tensor], Tensor | None]
"""(index of the move, level reached, x [B, C, H, W]) -> another x, or None to keep it."""


def sample(
    denoise: Denoiser,
    solver: Solver,
    timetable: Timetable,
    x: Tensor,
    *,
    edits: Sequence[Edit] = (),
    noise: NoiseStreams,
    callback: Callback | None = None,
) -> Tensor:
    """Run a solver through a timetable.

    The edits change, each in their order, the timetable; then the beginning; then every estimate
    of x_0; then x after every step. A level noisier than the one before it is reached by the
    forward kernel, and the solver starts anew there: a multistep solver whose history is reset at
    each step is its own one-step form. Two equal levels in a row are one. A solver that chooses its
    own steps makes as many between two levels as it needs, and the edits act after each of them.

    Gradients are the caller's affair: wrap the call in `torch.no_grad()` where none is wanted.

    Args:
        denoise: (x_t, level) -> x_0.
        solver: how a step towards the data is made.
        timetable: the levels to visit, from noise to data.
        x: [B, C, H, W] at timetable[0]; of pure noise, `process.prior_scale(timetable[0])` times
            standard noise.
        edits: constraints on the run.
        noise: streams of B pictures, for the steps and edits that draw.
        callback: told after every move.

    Returns:
        [B, C, H, W] at the last level.

    Raises:
        UserError: an edit has none of the touch points.
    """
    for edit in edits:
        if not isinstance(edit, Edit):
            raise UserError(
                f"{edit!r} is no edit: it has none of `timetable`, `begin`, `denoiser`, `after`, "
                "`beside`."
            )
    for edit in edits:
        if isinstance(edit, EditsTimetable):
            timetable = edit.timetable(timetable)
    for edit in edits:
        if isinstance(edit, EditsBegin):
            x = edit.begin(x, timetable, noise)
    for edit in edits:
        if isinstance(edit, EditsDenoiser):
            edited = edit.denoiser(denoise)
            denoise = denoise.around(edited) if isinstance(denoise, LearnsVariance) else edited
    constraints = [edit for edit in edits if isinstance(edit, EditsAfter)]

    state = solver.init()
    for index, (here, there) in enumerate(pairwise(timetable)):
        if there.log_snr < here.log_snr:
            scale, std = transition(here, there)
            x = scale * x + std * noise.like(x)
            state = solver.init()
        elif there.log_snr > here.log_snr:
            level = here
            while level.log_snr < there.log_snr:
                if isinstance(solver, ChoosesSteps):
                    x, level, state = solver.advance(denoise, x, level, there, state, noise)
                else:
                    x, state = solver.step(denoise, x, level, there, state, noise)
                    level = there
                for edit in constraints:
                    x = edit.after(x, level, noise)
        if callback is not None:
            replaced = callback(index, there, x)
            x = x if replaced is None else replaced
    return x

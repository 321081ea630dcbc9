"""THE loop: the only place where a run steps through a timetable."""

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser, Estimate
from latentdiff.diffusion.edits import (
    Edit,
    EditsAfter,
    EditsBegin,
    EditsDenoiser,
    EditsTimetable,
)
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, transition
from latentdiff.diffusion.solver import ChoosesSteps, Solver
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError

Callback = Callable[[int, NoiseLevel, Tensor], Tensor | None]
"""(index of the move, level reached, x [B, C, H, W]) -> another x, or None to keep it."""


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """One move of a run, made.

    Attributes:
        index: index of the move.
        level: the level reached.
        x: [B, C, H, W] there.
    """

    index: int
    level: NoiseLevel
    x: Tensor


def check_edits(edits: Sequence[object]) -> None:
    """Pass if each is an edit.

    Raises:
        UserError: one has none of the touch points.
    """
    for edit in edits:
        if not isinstance(edit, Edit):
            raise UserError(
                f"{edit!r:.60} is no edit: it has none of `timetable`, `begin`, `denoiser`, "
                "`after`, `conditioned`, `branches`, `beside`."
            )


def visited(timetable: Timetable, edits: Sequence[Edit]) -> Timetable:
    """The levels of a run: the timetable as the edits change it, each in its order."""
    for edit in edits:
        if isinstance(edit, EditsTimetable):
            timetable = edit.timetable(timetable)
    return timetable


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
    of x_0; then x after every step. `moves` says the rest.

    Gradients are the caller's affair: wrap the call in `torch.no_grad()` where none is wanted.

    Args:
        denoise: (x_t, level) -> its estimate of x_0.
        solver: makes a step towards the data.
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
    check_edits(edits)
    run = moves(denoise, solver, visited(timetable, edits), x, edits=edits, noise=noise)
    replaced: Tensor | None = None
    while True:
        try:
            move = run.send(replaced)
        except StopIteration as ended:
            return ended.value
        replaced = None if callback is None else callback(move.index, move.level, move.x)


def moves(
    denoise: Denoiser,
    solver: Solver,
    levels: Timetable,
    x: Tensor,
    *,
    edits: Sequence[Edit] = (),
    noise: NoiseStreams,
) -> Generator[Move, Tensor | None, Tensor]:
    """Make the moves of a run one by one; another x may be sent back after each.

    A level noisier than the one before it is reached by the forward kernel, and the solver starts
    anew there: a multistep solver whose history is reset at each step is its own one-step form. Two
    equal levels in a row are one. A solver that chooses its own steps makes as many between two
    levels as it needs, and the edits act after each of them.

    Args:
        denoise, solver, x, edits, noise: see `sample`.
        levels: those to visit, as `visited` gives them: the edits do not change them again.

    Returns:
        [B, C, H, W] at the last level.

    Raises:
        UserError: a solver that chooses its own steps asks more often than its `most_calls`.
    """
    if isinstance(solver, ChoosesSteps):
        denoise = _bounded(denoise, solver.most_calls)
    for edit in edits:
        if isinstance(edit, EditsBegin):
            x = edit.begin(x, levels, noise)
    for edit in edits:
        if isinstance(edit, EditsDenoiser):
            denoise = edit.denoiser(denoise)
    constraints = [edit for edit in edits if isinstance(edit, EditsAfter)]

    state = solver.init()
    for index, (here, there) in enumerate(itertools.pairwise(levels)):
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
        replaced = yield Move(index, there, x)
        x = x if replaced is None else replaced
    return x


def _bounded(denoise: Denoiser, most: int) -> Denoiser:
    """The same denoiser, which may be asked so often."""
    calls = itertools.count(1)

    def bounded(x: Tensor, level: NoiseLevel) -> Estimate:
        if next(calls) > most:
            raise UserError(
                f"the solver chooses its own steps, and has called the network {most} times at "
                f"t = {level.t:g}; take one of fixed steps, as 'dpmpp-2m', or with RePaint fewer "
                "resamples, or a larger tolerance."
            )
        return denoise(x, level)

    return bounded

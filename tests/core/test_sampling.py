"""The loop: jumps back, edits, callbacks; and the timetables that feed it."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentdiff import solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian, mixture
from latentdiff.diffusion.process import DiscreteVP, NoiseLevel
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.solvers import DPMpp2M

DATA = mixture([1, 2], [[0.0, 1.0], [1.0, -1.0]], [0.3, 0.5])
VP = process.create("vp-scaled-linear")
LEVELS = timetable.create("trailing", VP, 10)


def start(noise: NoiseStreams) -> Tensor:
    return noise.draw((2, 4, 4)).double()


class ToPoint:
    """An edit with three touch points: begin at a picture, visit 4 levels, end at it."""

    def __init__(self, picture: Tensor) -> None:
        self.picture = picture
        self.seen: list[NoiseLevel] = []
        self.asked = 0

    def timetable(self, timetable: Timetable) -> Timetable:
        self.asked += 1
        return timetable[-4:]

    def begin(self, x: Tensor, timetable: Timetable, noise: NoiseStreams) -> Tensor:
        return timetable[0].alpha * self.picture + timetable[0].sigma * noise.like(x)

    def after(self, x: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor:
        self.seen.append(level)
        return level.alpha * self.picture + level.sigma * noise.like(x)


class Shift:
    """An edit with one touch point."""

    def after(self, x: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor:
        return x + 1 if level.sigma == 0 else x


def test_edits_act_where_they_have_a_touch_point_and_in_their_order() -> None:
    noise = NoiseStreams(0)
    edit = ToPoint(torch.full((1, 2, 4, 4), 0.25, dtype=torch.float64))
    for edits, change in (([edit], 0), ([edit, Shift()], 1), ([Shift(), edit], 0)):
        edit.seen.clear()
        edit.asked = 0
        solver = solvers.create("dpmpp-2m")
        end = sampling.sample(DATA, solver, LEVELS, start(noise), edits=edits, noise=noise)
        assert torch.equal(end, edit.picture + change)
        assert edit.seen == list(LEVELS[-3:])
        assert edit.asked == 1  # an edit that keeps count, or draws, may rely on it


def test_what_is_no_edit_is_refused() -> None:
    noise = NoiseStreams(0)
    with pytest.raises(UserError, match="is no edit"):
        sampling.sample(
            DATA,
            solvers.create("ddim"),
            LEVELS,
            start(noise),
            edits=[object()],  # pyright: ignore[reportArgumentType]
            noise=noise,
        )


@pytest.mark.parametrize("kind", ["vp-linear-zsnr", "ve", "flow"])
def test_a_jump_back_is_the_forward_kernel(kind: str) -> None:
    """25,600 draws of q(x_low) jump up and must be draws of q(x_high), from clean data too."""
    where = process.create(kind)
    data = Gaussian(
        torch.tensor([0.5, -1.0]).double(), torch.diag(torch.tensor([1.0, 0.3])).double()
    )
    clean, low, high = where.data_level(), where.level_of_ratio(0.3), where.level_of_ratio(4)
    noise = NoiseStreams(4)
    x0 = noise.draw((2, 160, 160)).double()
    x0 = data.means[0][:, None, None] + data.variances[0].sqrt().flip(0)[:, None, None] * x0
    for levels in ([clean, low, high], [clean, high]):
        x = sampling.sample(data, solvers.create("ddim"), levels, x0, noise=noise)[0].flatten(1)
        variance = high.alpha**2 * torch.tensor([1.0, 0.3]).double() + high.sigma**2
        assert (
            (x.mean(1) - high.alpha * data.means[0]) / (variance / 25600).sqrt()
        ).abs().max() < 4.5
        assert (x.var(1) / variance - 1).abs().max() < 4.5 * math.sqrt(2 / 25600)


def test_a_jump_back_forgets_the_history() -> None:
    """A multistep solver that jumps back after each step is its one-step form."""
    jumping = [level for pair in zip(LEVELS[1:-1], LEVELS[:-2], strict=True) for level in pair]
    jumping = [LEVELS[0], *jumping, *LEVELS[-2:]]
    ends = []
    for name in ("dpmpp-2m", "ddim"):
        noise = NoiseStreams(3)
        solver = solvers.create(name)
        ends.append(sampling.sample(DATA, solver, jumping[:-1], start(noise), noise=noise))
    torch.testing.assert_close(*ends)


def test_equal_levels_are_one_and_an_end_is_an_end() -> None:
    noise = NoiseStreams(2)
    x = start(noise)
    doubled = [level for level in LEVELS for _ in range(2)]
    ends = [sampling.sample(DATA, DPMpp2M(), t, x, noise=noise) for t in (LEVELS, doubled)]
    assert torch.equal(*ends)
    assert sampling.sample(DATA, DPMpp2M(), LEVELS[-1:], x, noise=noise) is x


def test_the_callback_sees_and_may_replace() -> None:
    noise, seen = NoiseStreams(1), []

    def watch(index: int, level: NoiseLevel, x: Tensor) -> Tensor | None:
        seen.append((index, level))
        return torch.zeros_like(x) if level.sigma == 0 else None

    end = sampling.sample(
        DATA, solvers.create("heun"), LEVELS, start(noise), noise=noise, callback=watch
    )
    assert seen == list(enumerate(LEVELS[1:]))
    assert end.abs().max() == 0


def test_moves_made_one_by_one_are_the_run() -> None:
    """Bit for bit, with a jump back; an x that is sent back takes the place of the one reached."""
    levels = [*LEVELS[:5], *LEVELS[2:]]
    ends: list[Tensor] = []
    for replaced_at in (None, 3, len(levels) - 2):

        def watch(index: int, _: NoiseLevel, x: Tensor, at: int | None = replaced_at) -> Any:
            return x.flip(-1) if index == at else None

        solver = solvers.create("dpmpp-3m-sde")
        noise = NoiseStreams(1)
        x = start(noise)
        whole = sampling.sample(DATA, solver, levels, x, noise=noise, callback=watch)
        noise = NoiseStreams(1)
        run = sampling.moves(DATA, solver, levels, start(noise), noise=noise)
        made: list[sampling.Move] = []
        sent: Tensor | None = None
        for _ in levels[1:]:
            made.append(run.send(sent))
            sent = watch(made[-1].index, made[-1].level, made[-1].x)
        with pytest.raises(StopIteration) as ended:
            run.send(sent)
        assert torch.equal(ended.value.value, whole)
        ends.append(whole)
        assert [move.index for move in made] == list(range(len(levels) - 1))
        assert [move.level for move in made] == levels[1:]
    assert (ends[1] - ends[0]).abs().max() > 0.01
    assert torch.equal(ends[2], ends[0].flip(-1))


@pytest.mark.parametrize("kind", process.names())
@pytest.mark.parametrize("spacing", timetable.names())
def test_timetables_go_from_noise_to_data(kind: str, spacing: str) -> None:
    where = process.create(kind)
    for steps in (1, 2, 17):
        levels = timetable.create(spacing, where, steps)
        assert len(levels) == steps + 1
        assert levels[-1] == where.data_level()
        ratios = [level.ratio for level in levels]
        assert all(a > b for a, b in pairwise(ratios))
        if spacing != "leading":
            assert levels[0] == where.level(where.t_max)
        if spacing == "trailing" and kind == "flow":
            np.testing.assert_allclose([x.t for x in levels], np.linspace(1000, 0, steps + 1))


def test_karras_and_exponential_are_even_where_they_should_be() -> None:
    edm = process.create("edm")
    sigmas = np.array([level.sigma for level in timetable.create("karras", edm, 9)[:-1]])
    np.testing.assert_allclose(np.diff(sigmas ** (1 / 7), 2), 0, atol=1e-12)
    assert sigmas[[0, -1]] == pytest.approx([80, 0.002])
    ratios = np.array([x.ratio for x in timetable.create("exponential", VP, 9)[:-1]])
    np.testing.assert_allclose(np.diff(np.log(ratios), 2), 0, atol=1e-9)


def test_impossible_timetables_are_refused() -> None:
    with pytest.raises(UserError, match="at least 1 step, not 0"):
        timetable.create("trailing", VP, 0)
    with pytest.raises(UserError, match="at most 1000 steps"):
        timetable.create("leading", VP, 1001)
    with pytest.raises(UserError, match="did you mean 'karras'"):
        timetable.create("karas", VP, 10)
    with pytest.raises(UserError, match="did you mean 'dpmpp-2m'"):
        solvers.create("dpmpp_2m")
    assert isinstance(VP, DiscreteVP)
    every = timetable.create("leading", VP, VP.num_train_timesteps, steps_offset=1)
    assert every[0].t == 999

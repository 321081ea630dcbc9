"""Edits against closed forms: where SDEdit, RePaint and ILVR must end on Gaussian data."""

import math
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentdiff import solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.edits import Edit
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing import ILVR, Blend, RePaint, SDEdit
from latentdiff.editing.ilvr import Space
from latentdiff.editing.jumps import descents, first_visits, jump_schedule
from latentdiff.editing.lowpass import (
    keys_cubic,
    low_pass,
    low_pass_matrix,
    projection_matrix,
    resize_matrix,
)
from latentdiff.errors import UserError

SIDE = 100  # one picture of 10,000 pixels is as many independent draws
VP = process.create("vp-scaled-linear")


def gaussian(mean: list[float], covariance: list[list[float]]) -> Gaussian:
    return Gaussian(torch.tensor(mean).double(), torch.tensor(covariance).double())


def run(
    data: Gaussian, edits: list[Edit], levels: Timetable, solver: str = "ddpm", side: int = SIDE
) -> Tensor:
    noise = NoiseStreams(3)
    x = noise.draw((data.means.shape[1], side, side)).double() * math.hypot(
        levels[0].alpha, levels[0].sigma
    )
    return sampling.sample(data, solvers.create(solver, VP), levels, x, edits=edits, noise=noise)


@pytest.mark.parametrize("kind", ["vp-scaled-linear", "ve"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_sdedit_goes_from_the_guide_towards_the_data(kind: str, repeats: int) -> None:
    """Mean m + kappa^K (g - m) and variance s^2 (1 - kappa^2K), kappa = a^2 s^2 / (a^2 s^2 + b^2).

    Each round noises x (scale a, std b) and draws x_0 given x_t, which is Gaussian.
    """
    mean, std, guide = 0.3, 0.4, 2.0
    where = process.create(kind)
    ratios = np.geomspace(2.0, 0.03, 201).tolist()
    levels = [*(where.level_of_ratio(ratio) for ratio in ratios), where.data_level()]
    start = levels[201 - 160]
    edit = SDEdit(torch.full((1, 1, SIDE, SIDE), guide), 160.5 / 201, repeats)
    x = run(gaussian([mean], [[std**2]]), [edit], levels)

    signal = start.alpha**2 * std**2
    kappa = (signal / (signal + start.sigma**2)) ** repeats
    assert abs(x.mean() - (mean + kappa * (guide - mean))) < 0.01
    assert abs(x.std() / (std * math.sqrt(1 - kappa**2)) - 1) < 0.02


def test_repaint_converges_to_the_conditional_mean_as_jumps_grow() -> None:
    """One channel is known: the other must follow it as the covariance says, not only later on."""
    data = gaussian([0.0, 0.0], [[1.0, 0.9], [0.9, 1.0]])
    image = torch.full((1, 2, 1, 1), 1.5).expand(1, 2, 40, 40)
    mask = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    levels = timetable.create("trailing", VP, 50)
    errors = {}
    for jumps in (1, 2, 5):
        x = run(data, [RePaint(image, mask, jump_length=5, resamples=jumps)], levels, side=40)
        assert torch.equal(x[:, :1], image.double()[:, :1])
        errors[jumps] = abs(x[:, 1].mean().item() - 0.9 * 1.5)
    plain = run(data, [Blend(image, mask)], levels, side=40)
    assert abs(plain[:, 1].mean() - 0.9 * 1.5) == errors[1]
    assert errors[5] < 0.5 * errors[1]
    assert errors[5] < errors[2] < errors[1]


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp-2m"])
def test_ilvr_ends_with_the_low_frequencies_of_the_reference(solver: str) -> None:
    data = gaussian([0.2], [[0.5]])
    reference = NoiseStreams(5).draw((1, 64, 64)).double()
    levels = timetable.create("trailing", VP, 20)
    x = run(data, [ILVR(reference)], levels, solver, side=64)
    free = run(data, [ILVR(reference, until=1.0)], levels, solver, side=64)
    gaps = [(low_pass(one, 4) - low_pass(reference, 4)).square().mean().sqrt() for one in (x, free)]
    assert gaps[0] < 1e-6
    assert gaps[1] > 0.1
    # The detail is the data's: as in a run without a reference, though the reference has more.
    detail, plain, given = (one - low_pass(one, 4) for one in (x, free, reference))
    assert abs(detail.std() / plain.std() - 1) < 0.05
    assert given.std() > 1.3 * detail.std()


def test_ilvr_of_everything_is_the_reference() -> None:
    reference = NoiseStreams(5).draw((2, 8, 8)).double()
    data = gaussian([0.2, 0.0], [[0.5, 0.0], [0.0, 1.0]])
    levels = timetable.create("karras", process.create("flow"), 5)
    x = run(data, [ILVR(reference, factor=1)], levels, "heun", side=8)
    assert (x - reference).abs().max() < 1e-12


def test_the_low_pass_is_keys_cubic_antialiased_and_mirrored() -> None:
    assert keys_cubic(np.array([0.0, 0.5, 1.0, 1.5, 2.0])).tolist() == [1, 0.5625, 0, -0.0625, 0]
    inside = resize_matrix(32, 8)[4]  # centre 17.5; taps 4 pixels apart in the kernel's unit
    expected = keys_cubic((17.5 - np.arange(32)) / 4) / 4
    np.testing.assert_allclose(inside, expected / expected.sum(), atol=1e-15)
    for side, factor in ((8, 4), (64, 4), (7, 3), (5, 8)):
        matrix = low_pass_matrix(side, factor)
        np.testing.assert_allclose(matrix.sum(1), 1)  # a flat picture stays
        np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-15)  # neither side is first
        exact = projection_matrix(side, factor)
        np.testing.assert_allclose(exact @ exact, exact, atol=1e-12)
        small = resize_matrix(side, -(-side // factor))
        np.testing.assert_allclose(small @ exact, small, atol=1e-12)
    wave = np.cos(np.pi * np.arange(64))  # the finest pattern is gone, not aliased
    assert np.abs(low_pass_matrix(64, 4) @ wave)[16:48].max() < 0.01
    # Mirrored: the filter of a picture and of its reflection at the edge agree.
    row = np.random.default_rng(0).normal(size=16)
    doubled = low_pass_matrix(32, 4) @ np.concatenate([row[::-1], row])
    np.testing.assert_allclose(doubled[16:], low_pass_matrix(16, 4) @ row, atol=1e-12)


def test_jumps_are_those_of_the_paper() -> None:
    assert jump_schedule(6, 2, 2) == [5, 4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0, -1]
    assert len(jump_schedule(250, 10, 10)) == 4571
    levels = timetable.create("trailing", VP, 250)
    x = torch.zeros(1, 1, 2, 2)
    scaled = RePaint(x, torch.zeros(1, 1, 2, 2)).timetable(levels)
    assert [249 - levels.index(level) for level in scaled] == jump_schedule(250, 10, 10)


@settings(deadline=None, max_examples=50)
@given(
    steps=st.integers(1, 40),
    length=st.integers(1, 12),
    resamples=st.integers(1, 4),
    start=st.floats(0, 1),
)
def test_jumps_keep_the_run(steps: int, length: int, resamples: int, start: float) -> None:
    times = jump_schedule(steps, length, resamples, start)
    moves = np.diff(times)
    assert times[0] == steps - 1
    assert times[-1] == -1
    assert set(np.abs(moves)) <= {1}
    tops = [t for t, up, down in zip(times[1:-1], moves, moves[1:], strict=False) if up > 0 > down]
    assert all(top <= start * steps for top in tops)
    if resamples == 1 or start == 0:
        assert times == list(range(steps - 1, -2, -1))
    levels = timetable.create("karras", VP, steps)
    image = torch.zeros(1, 1, 2, 2)
    jumping = RePaint(image, image, length, resamples, start).timetable(levels)
    assert first_visits(jumping) == list(levels)
    assert [level for run in descents(jumping) for level in run] == list(jumping)


def test_sdedit_and_repaint_compose_in_any_order() -> None:
    """Six of ten steps, with the jumps of a run of six, twice."""
    image, mask = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    levels = timetable.create("trailing", VP, 10)
    late, jumps = SDEdit(image, 0.6, repeats=2), RePaint(image, mask, 2, 2)
    expected = [9 - t for t in jump_schedule(6, 2, 2)] * 2
    one = jumps.timetable(late.timetable(levels))
    assert [levels.index(level) for level in one] == expected
    other = late.timetable(jumps.timetable(levels))
    assert other[0] == levels[4]
    assert max(level.ratio for level in other) == levels[4].ratio
    assert first_visits(other) == list(levels[4:])


@pytest.mark.parametrize("solver", solvers.names())
def test_extremes(solver: str) -> None:
    """Strength 0 and a known whole return the input; strength 1 and nothing known ignore it."""
    data = gaussian([0.5, -1.0], [[1.0, 0.3], [0.3, 0.5]])
    image = NoiseStreams(9).draw((2, 6, 6)).double()
    levels = timetable.create("trailing", VP, 6)
    none, everything = torch.zeros(1, 1, 6, 6), torch.ones(1, 1, 6, 6)
    plain = run(data, [], levels, solver, side=6)
    for edit in (SDEdit(image, 0.0), SDEdit(image, 0.0, repeats=3), RePaint(image, none)):
        assert torch.equal(run(data, [edit], levels, solver, side=6), image)
    for edit in (SDEdit(image, 1.0), RePaint(image, everything), Blend(image, everything)):
        assert torch.equal(run(data, [edit], levels, solver, side=6), plain)
    half = run(data, [SDEdit(image, 0.5, mask=none)], levels, solver, side=6)
    assert torch.equal(half, image)


@pytest.mark.parametrize("name", ["Blend", "RePaint", "SDEdit"])
def test_a_picture_with_nothing_known_is_the_same_in_a_batch_of_masks(name: str) -> None:
    data = gaussian([0.5, -1.0], [[1.0, 0.3], [0.3, 0.5]])
    levels = timetable.create("trailing", VP, 6)
    image, start = (NoiseStreams(seed, count=3).draw((2, 6, 6)).double() for seed in (9, 8))
    masks = torch.stack([torch.zeros(1, 6, 6), torch.ones(1, 6, 6), torch.ones(1, 6, 6)])
    masks[2, :, 3:] = 0.5
    edit = {
        "Blend": lambda k: Blend(image[k], masks[k]),
        "RePaint": lambda k: RePaint(image[k], masks[k], resamples=1),
        "SDEdit": lambda k: SDEdit(image[k], 0.7, mask=masks[k]),
    }[name]

    def drawn(k: slice) -> Tensor:
        noise = NoiseStreams(3, k.start, k.stop - k.start)
        return sampling.sample(
            data, solvers.create("ddpm"), levels, start[k], edits=[edit(k)], noise=noise
        )

    alone = torch.cat([drawn(slice(k, k + 1)) for k in range(3)])
    torch.testing.assert_close(drawn(slice(0, 3)), alone)


def test_strength_counts_steps_as_the_field_does() -> None:
    image = torch.zeros(1, 1, 4, 4)
    levels = timetable.create("trailing", VP, 20)
    for strength, steps in ((1.0, 20), (0.6, 12), (0.59, 11), (0.05, 1), (0.0, 0)):
        assert len(SDEdit(image, strength).timetable(levels)) == steps + 1
    with pytest.raises(UserError, match="less than one step"):
        SDEdit(image, 0.04).timetable(levels)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda x: SDEdit(x, 1.1), "strength"),
        (lambda x: SDEdit(x, float("nan")), "strength"),
        (lambda x: SDEdit(x, 0.5, repeats=0), "repeats"),
        (lambda x: SDEdit(x[0], 0.5), "latents"),
        (lambda x: RePaint(x, x, jump_length=0), "jump_length"),
        (lambda x: RePaint(x, x, resamples=0), "resamples"),
        (lambda x: RePaint(x, x, start=2), "start"),
        (lambda x: RePaint(x), "both"),
        (lambda x: ILVR(x, factor=0), "factor"),
        (lambda x: ILVR(x, until=-1), "until"),
        (lambda x: ILVR(x, space=cast("Space", "pixel")), "did you mean 'pixels'"),
        (lambda x: run(ANY, [ILVR(x, space="pixels")], LEVELS, side=4), "autoencoder"),
        (lambda x: run(ANY, [ILVR(x)], LEVELS, side=5), "latents"),
    ],
)
def test_mistakes_are_named(make, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(torch.zeros(1, 1, 4, 4))


ANY = gaussian([0.0], [[1.0]])
LEVELS = timetable.create("trailing", VP, 2)

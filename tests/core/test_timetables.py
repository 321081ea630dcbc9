"""Timetables of tables, quantiles and lists; shifts and restarts."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import beta

from latentdiff import solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian
from latentdiff.errors import UserError

VP = process.create("vp-scaled-linear")
FLOW = process.Flow()


def test_lu_is_even_in_log_snr() -> None:
    places = [level.log_snr for level in timetable.create("lu", VP, 12)[:-1]]
    np.testing.assert_allclose(np.diff(places, 2), 0, atol=1e-9)


@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_an_end_without_signal_takes_one_step(name: str) -> None:
    """The cosine schedule begins at sigma / alpha 20,000, where half of its levels would lie."""
    cosine = process.create("vp-cosine")
    first, *others, _ = timetable.create(name, cosine, 12)
    assert first == cosine.level(999.0)
    assert first.ratio > 20_000
    ratios = [level.ratio for level in others]
    np.testing.assert_allclose(ratios, timetable.ramp(name, 80, ratios[-1], 11), rtol=1e-9)
    assert timetable.create(name, cosine, 1) == (first, cosine.data_level())
    for kind in ("edm", "ve", "vp-scaled-linear"):  # 80, 50 and 15
        where = process.create(kind)
        ratios = [level.ratio for level in timetable.create(name, where, 9)[:-1]]
        ends = where.level(where.t_max).ratio, where.level(where.t_min).ratio
        np.testing.assert_allclose(ratios, timetable.ramp(name, *ends, 9), rtol=1e-9)


@pytest.mark.parametrize("steps", [2, 10, 33])
def test_beta_takes_the_quantiles_of_beta(steps: int) -> None:
    levels = timetable.create("beta", VP, steps)
    expected = 999 * beta.ppf(1 - np.arange(steps) / steps, 0.6, 0.6)
    np.testing.assert_allclose([level.t for level in levels[:-1]], expected, atol=1e-3)


@pytest.mark.parametrize("name", ["ays-sd1", "ays-sdxl"])
def test_ays_is_its_table_at_ten_steps_and_between_at_others(name: str) -> None:
    """The published times of the tables, to the whole number."""
    times = {
        "ays-sd1": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24],
        "ays-sdxl": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13],
    }
    levels = timetable.create(name, VP, 10)
    np.testing.assert_allclose([level.t for level in levels[:-1]], times[name], atol=1.5)
    double = timetable.create(name, VP, 20)
    np.testing.assert_allclose([x.ratio for x in double[:-1:2]], [x.ratio for x in levels[:-1]])


def test_explicit_times_and_sigmas() -> None:
    levels = timetable.of_times(VP, [999, 500, 20])
    assert [level.t for level in levels] == [999, 500, 20, 0]
    assert levels[-1] == VP.data_level()
    sigmas = timetable.of_sigmas(VP, [14.0, 3.0, 0.1, 0.0])
    np.testing.assert_allclose([level.ratio for level in sigmas], [14, 3, 0.1, 0], rtol=1e-9)
    with pytest.raises(UserError, match="fall"):
        timetable.of_times(VP, [10, 20])
    with pytest.raises(UserError, match="within"):
        timetable.of_times(VP, [1500, 20])
    with pytest.raises(UserError, match="positive"):
        timetable.of_sigmas(VP, [3.0, -1.0])
    with pytest.raises(UserError, match="at least one"):
        timetable.of_sigmas(VP, [])


def test_shift_is_that_of_stable_diffusion_3() -> None:
    levels = timetable.create("trailing", FLOW, 8)
    shifted = timetable.shift(FLOW, levels, 3.0)
    expected = [3 * level.t / (1 + 2 * level.t) for level in levels]
    np.testing.assert_allclose([level.t for level in shifted], expected, atol=1e-12)
    assert (shifted[0], shifted[-1]) == (levels[0], levels[-1])
    with pytest.raises(UserError, match="positive factor"):
        timetable.shift(FLOW, levels, 0.0)


def test_restart_jumps_where_it_says() -> None:
    levels = timetable.create("karras", VP, 12)
    low, high = levels[9].ratio, levels[5].ratio
    again = timetable.restart(levels, low, high, 2)
    assert [levels.index(x) for x in again] == [
        *range(10),
        *range(5, 10),
        *range(5, 10),
        10,
        11,
        12,
    ]
    few = timetable.restart(levels, low, high, 1, steps=2)
    assert [levels.index(x) for x in few] == [*range(10), 5, 7, 9, 10, 11, 12]
    jumps = [b for a, b in pairwise(again) if b.ratio > a.ratio]
    assert jumps == [levels[5]] * 2
    with pytest.raises(UserError, match="no levels"):
        timetable.restart(levels, low, 1e9, 1)
    with pytest.raises(UserError, match="at least 1 repeat"):
        timetable.restart(levels, low, high, 0)


def test_restart_keeps_the_law() -> None:
    """Up by the forward kernel and down by an exact flow: the data's own law."""
    data = Gaussian(torch.tensor([0.5]).double(), torch.tensor([[0.6]]).double())
    levels = timetable.restart(timetable.create("lu", VP, 80), 0.1, 2.0, 2)
    noise = NoiseStreams(0)
    x = noise.draw((1, 80, 80)).double()
    end = sampling.sample(data, solvers.create("dpmpp-2m"), levels, x, noise=noise)
    assert abs(end.mean() - 0.5) < 4.5 * math.sqrt(0.6 / 6400)
    assert abs(end.var() / 0.6 - 1) < 4.5 * math.sqrt(2 / 6400)

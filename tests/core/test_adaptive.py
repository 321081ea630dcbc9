"""Solvers that choose their steps: errors follow tolerances, edits follow steps."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from latentdiff import solvers
from latentdiff.diffusion import process, sampling
from latentdiff.diffusion.denoiser import Estimate
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.errors import UserError
from latentdiff.solvers.embedded_pairs import dpm_adaptive, rk45

DATA = Gaussian(
    torch.tensor([0.5, -1.0], dtype=torch.float64),
    torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64),
)
KINDS = ["vp-linear-zsnr", "vp-continuous", "edm", "flow"]


class Counted:
    """The exact denoiser, and the levels it was asked at."""

    def __init__(self) -> None:
        self.levels: list[NoiseLevel] = []

    def __call__(self, x: Tensor, level: NoiseLevel) -> Estimate:
        self.levels.append(level)
        return DATA(x, level)


def start(where: Process) -> tuple[Tensor, list[NoiseLevel]]:
    levels = [where.level(where.t_max), where.data_level()]
    x = NoiseStreams(7).draw((2, 4, 4)).double() * where.prior_scale(levels[0])
    return x, levels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [rk45, dpm_adaptive])
def test_the_error_follows_the_tolerance(make, kind: str) -> None:
    where = process.create(kind)
    x, levels = start(where)
    truth = DATA.flow(x, levels[0], levels[-1])
    errors, calls = [], []
    for tolerance in (1e-2, 1e-4):
        denoise = Counted()
        solver = make(where, tolerance, tolerance)
        end = sampling.sample(denoise, solver, levels, x, noise=NoiseStreams(0))
        errors.append((end - truth).abs().max().item())
        calls.append(len(denoise.levels))
    # The last step, from t_min, is of first order and sets a floor of its own.
    assert errors[1] < 0.03
    assert errors[0] < 0.5
    assert calls[0] < calls[1] < 1500


def test_rk45_is_as_exact_as_it_is_told() -> None:
    """Between two noisy levels, without the floor."""
    where = process.create("vp-continuous")
    levels = [where.level_of_ratio(20.0), where.level_of_ratio(0.05)]
    x, _ = start(where)
    truth = DATA.flow(x, levels[0], levels[1])
    end = sampling.sample(DATA, rk45(where, 1e-8, 1e-8), levels, x, noise=NoiseStreams(0))
    assert (end - truth).abs().max() < 1e-6


def test_an_sde_ends_with_the_law_of_the_data() -> None:
    where = process.create("vp-continuous")
    noise = NoiseStreams(3)
    x, levels = noise.draw((2, 64, 64)).double(), start(where)[1]
    solver = solvers.create("sde-adaptive", where)
    draws = sampling.sample(DATA, solver, levels, x, noise=noise)[0].flatten(1)
    assert (draws.mean(1) - DATA.means[0]).abs().max() < 0.06
    covariance = torch.tensor([[1.0, 0.3], [0.3, 0.5]]).double()
    assert (torch.cov(draws) - covariance).abs().max() < 0.08


class Watch:
    """An edit that notes where it was called, and leaves a mark at the first place."""

    def __init__(self) -> None:
        self.levels: list[NoiseLevel] = []

    def after(self, x: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor:
        self.levels.append(level)
        return x + 0.1 if len(self.levels) == 1 else x


def test_edits_act_after_every_accepted_step() -> None:
    where = process.create("vp-continuous")
    x, levels = start(where)
    watch, denoise = Watch(), Counted()
    solver = rk45(where, 1e-3, 1e-3)
    sampling.sample(denoise, solver, levels, x, edits=[watch], noise=NoiseStreams(0))
    places = [level.log_snr for level in watch.levels]
    assert places == sorted(places)
    assert len(places) > 5
    assert watch.levels[-1] == levels[-1]
    # Each step asks six times, and a seventh where the slope is not known from the step before:
    # at the first, and after the edit changed x. The step to clean data asks once.
    assert len(denoise.levels) >= 6 * (len(places) - 1) + 3


def test_a_run_that_is_begun_anew_without_end_is_given_up() -> None:
    """RePaint's jumps: each stretch is short, and costs the solver several steps."""
    where = process.create("vp-continuous")
    x, (first, last) = start(where)
    low, high = where.level_of_ratio(2.0), where.level_of_ratio(3.0)
    levels = [first, *[high, low] * 40, last]
    denoise = Counted()
    barred = dataclasses.replace(rk45(where), most_calls=300)
    with pytest.raises(UserError, match=r"called the network 300 times at t = 0\.\d+; take one of"):
        sampling.sample(denoise, barred, levels, x, noise=NoiseStreams(0))
    assert len(denoise.levels) == 300
    plain = solvers.create("dpmpp-2m")  # is not bounded: its calls are those that were asked for
    sampling.sample(denoise, plain, levels * 10, x, noise=NoiseStreams(0))
    assert len(denoise.levels) > 300 + 410


def test_step_goes_all_the_way() -> None:
    """As a plain solver, inside another loop, it makes the same steps."""
    where = process.create("flow")
    x, levels = start(where)
    solver = dpm_adaptive(where)
    noise = NoiseStreams(0)
    whole, _ = solver.step(DATA, x, levels[0], levels[1], solver.init(), noise)
    assert torch.equal(whole, sampling.sample(DATA, solver, levels, x, noise=noise))


def test_a_network_of_nan_is_no_endless_loop() -> None:
    where = process.create("edm")
    x, levels = start(where)
    with pytest.raises(UserError, match="finite"):
        sampling.sample(
            lambda x, level: Estimate(x * math.nan), rk45(where), levels, x, noise=NoiseStreams(0)
        )
    with pytest.raises(UserError, match="tolerances"):
        rk45(where, atol=0.0)

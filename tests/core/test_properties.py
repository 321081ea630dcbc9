"""Whatever the process, prediction, timetable and solver: what must hold of every run."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentdiff import solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.denoiser import Denoiser, Estimate
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian, GaussianMixture, mixture
from latentdiff.diffusion.prediction import Prediction, target, to_x0
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.solver import eps_of

MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
POINT = Gaussian(MEAN, torch.zeros(2, 2, dtype=torch.float64))
DATA = mixture([0.3, 0.7], [[-1.0, 0.5], [1.2, -0.3]], [0.4, 0.6])
DRAWS = {"ddpm", "euler-a", "dpm2-a", "dpmpp-sde", "dpmpp-2m-sde", "dpmpp-3m-sde", "sa-solver"}
DRAWS |= {"euler-maruyama", "pc", "annealed-langevin", "recovery-langevin", "sde-adaptive"}
DRAWS |= {"consistency", "lcm", "tcd"}
runs = given(
    kind=st.sampled_from(process.names()),
    prediction=st.sampled_from(("eps", "x0", "v", "score", "flow")),
    spacing=st.sampled_from(timetable.names()),
    steps=st.integers(1, 6),
)
names = pytest.mark.parametrize("name", solvers.names())


@cache
def where_of(kind: str) -> process.Process:
    return process.create(kind)


def told(data: GaussianMixture, prediction: Prediction) -> Denoiser:
    """The exact denoiser as a network of this prediction tells it."""

    def denoise(x: Tensor, level: NoiseLevel) -> Estimate:
        x0 = data(x, level).x0
        if level.alpha == 0 and prediction in ("eps", "score"):
            return Estimate(x0)  # they say nothing there
        said = target(prediction, x0, eps_of(x, x0, level), level.alpha, level.sigma)
        return Estimate(to_x0(prediction, said, x, level.alpha, level.sigma))

    return denoise


@names
@settings(max_examples=4)
@runs
def test_a_run_ends_finite_and_in_shape(
    name: str, kind: str, prediction: Prediction, spacing: str, steps: int
) -> None:
    where, noise = where_of(kind), NoiseStreams(3, count=2)
    levels = timetable.create(spacing, where, steps)
    x = noise.draw((2, 3, 4)).double() * where.prior_scale(levels[0])
    solver = solvers.create(name, where)
    end = sampling.sample(told(DATA, prediction), solver, levels, x, noise=noise)
    assert end.shape == (2, 2, 3, 4)
    assert torch.isfinite(end).all()


@names
@settings(max_examples=4)
@runs
def test_one_picture_is_reached_exactly_by_every_timetable(
    name: str, kind: str, prediction: Prediction, spacing: str, steps: int
) -> None:
    """A Gaussian without width: all timetables end there, and between keep its one noise."""
    where, noise = where_of(kind), NoiseStreams(3)
    levels = timetable.create(spacing, where, steps)
    x = noise.draw((2, 3, 4)).double() * where.prior_scale(levels[0])
    if name == "pndm" and 1e3 < levels[0].ratio < math.inf:
        return  # the cosine schedule's 20,000, four times over, is all of float64
    solver, denoise = solvers.create(name, where), told(POINT, prediction)
    end = sampling.sample(denoise, solver, levels, x, noise=noise)
    if name != "lcm":  # whose boundary condition mixes x into x_0
        assert (end - MEAN[:, None, None]).abs().max() < 1e-6
    if name not in DRAWS and math.isfinite(levels[0].ratio):
        last = levels[-2]
        near = sampling.sample(denoise, solver, levels[:-1], x, noise=noise)
        bound = 1e-4 if "adaptive" in solvers.describe()[name] else 1e-6
        assert (near - POINT.flow(x, levels[0], last)).abs().max() < bound * (1 + last.sigma)

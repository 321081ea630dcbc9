"""Every solver's order of convergence, measured on closed-form denoisers in float64."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from latentdiff import solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian, mixture
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.solvers import Solver

DATA = mixture([0.3, 0.5, 0.2], [[-1.0, 0.5], [1.2, -0.3], [0.1, 1.4]], [0.4, 0.6, 0.5])
NOISE = NoiseStreams(0)
DETERMINISTIC = ["ddim", "euler", "heun", "dpmpp-2m"]
PROCESSES = ["vp-scaled-linear", "vp-continuous", "ve", "edm", "flow"]
# (name, declared order). With rising order the last digits come in later: lms at 192 steps is 3.9.
HIGHER = [
    ("dpm2", 2),
    ("dpm-solver-3", 3),
    ("dpmpp-2s", 2),
    ("dpmpp-3m", 3),
    ("lms", 4),
    ("deis", 3),
    ("deis-2", 2),
    ("deis-tab", 3),
    ("deis-rhoab", 3),
    ("gddim", 3),
    ("pndm", 2),
    ("plms", 2),
    ("ipndm", 2),
    ("unipc", 3),
    ("unipc-bh1", 3),
    ("unipc-3", 4),
]


def points() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=generator)


@cache
def exact_flow(here: float, there: float) -> Tensor:
    """End of the probability flow of x / sigma = points() between two sigma / alpha.

    d(x / sigma) / d(alpha / sigma) = x_0, in the angle of alpha / sigma, so that it may begin at
    pure noise; by an adaptive method of order 8.
    """

    def slope(angle: float, y: NDArray[np.float64]) -> NDArray[np.float64]:
        level = NoiseLevel(0.0, math.sin(angle), math.cos(angle))
        x0 = DATA(torch.from_numpy(y).view_as(points()) * level.sigma, level).x0
        return x0.numpy().ravel() / math.cos(angle) ** 2

    ends = (math.atan2(1, here), math.atan2(1, there))
    end = solve_ivp(slope, ends, points().numpy().ravel(), "DOP853", rtol=1e-11, atol=1e-12)
    return torch.from_numpy(end.y[:, -1]).view_as(points())


def measured_order(solver: Solver, runs: list[list[NoiseLevel]]) -> tuple[float, list[float]]:
    """The order between the last two of runs with doubling numbers of steps, and all errors."""
    errors = []
    for levels in runs:
        start, end = levels[0], levels[-1]
        got = sampling.sample(DATA, solver, levels, points() * start.sigma, noise=NOISE)
        truth = exact_flow(round(start.ratio, 9), round(end.ratio, 9)) * end.sigma
        errors.append((got - truth).abs().max().item())
    return math.log2(errors[-2] / errors[-1]), errors


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_is_the_declared_one(name: str, kind: str) -> None:
    """Steps even in log-SNR, between two places that are no end of the process."""
    solver, where = solvers.create(name), process.create(kind)
    runs = [
        [where.level_of_ratio(ratio) for ratio in np.geomspace(5, 0.1, steps + 1).tolist()]
        for steps in (96, 192)
    ]
    order, errors = measured_order(solver, runs)
    assert abs(order - solver.order) < 0.15, errors


def gentle_start(where: Process, steps: int, order: int) -> list[NoiseLevel]:
    """Steps even in log-SNR, but for the first ones.

    A multistep solver of order p begins with a step of order 1, then 2: these are made so short,
    h^(p / (k + 1)), that their errors are of the order of all others.
    """
    whole = math.log(5 / 0.1)
    h = whole / steps
    lengths = [h ** max(1.0, order / (k + 1)) for k in range(order)]
    rest = whole - sum(lengths)
    lengths += [rest / round(rest / h)] * round(rest / h)
    places = np.cumsum([0.0, *lengths]).tolist()
    return [where.level_of_ratio(5 * math.exp(-place)) for place in places]


@pytest.mark.parametrize("kind", ["vp-continuous", "flow"])
@pytest.mark.parametrize(("name", "order"), HIGHER)
def test_higher_orders_are_the_declared_ones(name: str, order: int, kind: str) -> None:
    where = process.create(kind)
    solver = solvers.create(name, where)
    assert solver.order == order
    counts = (192, 384) if name == "deis" else (96, 192)
    runs = [gentle_start(where, steps, order) for steps in counts]
    measured, errors = measured_order(solver, runs)
    assert abs(measured - order) < 0.15, errors


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_from_pure_noise(name: str) -> None:
    """Rectified flow begins where alpha is 0: the whole run stays of the declared order.

    Even in t, step k from there has the length 1 / k in log-SNR. The error of DPM-Solver++(2M) in
    each is 1 / (k n^2), whose sum is ln(n) / n^2: this factor is taken out before the order.
    """
    solver, flow = solvers.create(name), process.Flow()
    runs = [[flow.level(t) for t in np.linspace(1, 0.2, n + 1).tolist()] for n in (128, 256)]
    order, errors = measured_order(solver, runs)
    if name == "dpmpp-2m":
        order += math.log2(math.log(256) / math.log(128))
    assert abs(order - solver.order) < 0.15, errors


@pytest.mark.parametrize("kind", process.names())
def test_a_gaussian_flows_to_its_exact_end(kind: str) -> None:
    """From the noise end to clean data, through every process, against the closed form."""
    data = Gaussian(
        torch.tensor([0.5, -1.0], dtype=torch.float64),
        torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64),
    )
    where = process.create(kind)
    levels = timetable.create("karras", where, 200)
    x = points() * where.prior_scale(levels[0])
    truth = data.flow(x, levels[0], levels[-1])
    got = sampling.sample(data, solvers.create("dpmpp-2m"), levels, x, noise=NOISE)
    # At 200 steps the widest step, out of the largest sigma / alpha, dominates.
    assert (got - truth).abs().max() < 5e-3 * truth.abs().max()


def test_the_mixture_of_one_is_the_gaussian() -> None:
    """The oracle itself: the posterior mean against its formula, solved directly."""
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    level = process.create("vp-continuous").level(0.4)
    x = points()
    spread = level.alpha**2 * covariance + level.sigma**2 * torch.eye(2, dtype=torch.float64)
    away = (x - level.alpha * mean[:, None, None]).flatten(2)
    pulled = level.alpha * covariance @ torch.linalg.solve(spread, away)
    expected = pulled.reshape(x.shape) + mean[:, None, None]
    torch.testing.assert_close(Gaussian(mean, covariance)(x, level).x0, expected)


def test_the_mixture_is_its_own_score() -> None:
    """Tweedie: x_0 = (x + sigma^2 grad ln p) / alpha, with p differentiated by autograd."""
    level = process.Flow().level(0.6)
    x = points().requires_grad_()
    spread = level.alpha**2 * torch.tensor([0.4, 0.6, 0.5]).double() ** 2 + level.sigma**2
    away = x[:, None] - level.alpha * DATA.means[:, :, None, None]
    log_p = DATA.log_weights[:, None, None] - spread.log()[:, None, None]
    log_p = (log_p - (away**2).sum(2) / (2 * spread[:, None, None])).logsumexp(1)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    torch.testing.assert_close(DATA(x, level).x0, (x + level.sigma**2 * score) / level.alpha)

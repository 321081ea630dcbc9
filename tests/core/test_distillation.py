"""What a distilled network learns, against closed forms."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion import process as processes
from latentdiff.diffusion import timetable
from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import Branch, Estimate
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian, mixture
from latentdiff.diffusion.process import DiscreteVP, Flow, NoiseLevel, Process, beta_schedule
from latentdiff.guidance import classifier_free
from latentdiff.learning.distillation import (
    Levels,
    consistency,
    consistency_levels,
    consistency_loss,
    ddim_step,
    guided,
    noised,
    progressive_target,
    teacher_step,
)

MEAN, STD, EPS, LAST = 0.7, 0.5, 0.002, 80.0
VP = DiscreteVP(beta_schedule("scaled-linear"))


def gaussian(x: Tensor, level: Levels) -> Tensor:
    """E[x_0 | x_t] of N(MEAN, STD^2)."""
    alpha, sigma = level.alpha, level.sigma
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return MEAN + gain * (x - alpha * MEAN)


def bent(x: Tensor, level: Levels) -> Tensor:
    """An estimate of nothing in particular, curved in x and in time."""
    return torch.tanh(2 * x) + torch.cos(x * level.t.view(-1, 1, 1, 1) / 300)


def rows(*levels: NoiseLevel) -> Levels:
    return Levels.of(levels)


@pytest.mark.parametrize("process", [VP, Flow(1000.0)], ids=["vp", "flow"])
@pytest.mark.parametrize("estimate", [gaussian, bent])
def test_one_progressive_step_is_two_of_the_teacher(process: Process, estimate) -> None:
    """For every pair of steps of a run of 16, the one to clean data included."""
    levels = timetable.create("trailing", process, 16)
    here, middle, there = rows(*levels[:-1:2]), rows(*levels[1::2]), rows(*levels[2::2])
    x = torch.linspace(-3, 3, len(here.t) * 12, dtype=torch.float64).view(-1, 3, 2, 2)
    target = progressive_target(estimate, x, here, middle, there)
    half = ddim_step(x, estimate(x, here), here, middle)
    end = ddim_step(half, estimate(half, middle), middle, there)
    assert (ddim_step(x, target, here, there) - end).abs().max() <= 1e-12
    assert (target - estimate(x, here)).abs().max() > 1e-3  # not the plain estimate


def karras(count: int) -> list[NoiseLevel]:
    """Karras et al. 2022, eq. 5, of the variance-exploding process: LAST .. EPS."""
    ramp = torch.linspace(LAST ** (1 / 7), EPS ** (1 / 7), count + 1, dtype=torch.float64) ** 7
    return [NoiseLevel(sigma, 1.0, sigma) for sigma in ramp.tolist()]


def exact(x: Tensor, sigma: float) -> Tensor:
    """The consistency function of N(MEAN, STD^2): along the ODE, x - MEAN scales with the
    standard deviation of the marginal."""
    return MEAN + (x - MEAN) * math.sqrt((STD**2 + EPS**2) / (STD**2 + sigma**2))


def step_of(kind: str, x: Tensor, here: Levels, there: Levels) -> Tensor:
    if kind != "training":
        return teacher_step(gaussian, x, here, there, kind)  # pyright: ignore[reportArgumentType]
    # The mean over x_0 and its noise given x, for a function that is linear.
    x0 = gaussian(x, here)
    return noised(x0, (x - here.alpha * x0) / here.sigma, there)


def test_the_consistency_function_is_the_end_of_the_ode() -> None:
    mean, variance = torch.tensor([[MEAN], [STD**2]], dtype=torch.float64)
    x = torch.tensor([-120.0, 3.0, 90.0], dtype=torch.float64).view(3, 1, 1, 1)
    here, there = (NoiseLevel(sigma, 1.0, sigma) for sigma in (LAST, EPS))
    end = Gaussian(mean, variance[None]).flow(x, here, there)
    assert (end - exact(x, LAST)).abs().max() < 1e-10


def test_an_error_of_v_costs_the_same_at_every_level() -> None:
    process, error = processes.create("vp-cosine"), torch.ones(1, 4, 8, 8)
    losses: list[float] = []
    for t in (30.0, 300.0, 900.0):
        here = Levels.of([process.level(t)])
        losses.append(consistency_loss(here.sigma.float() * error, 0 * error, here).item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "order", "errors"),
    [
        # Of the slope at t = 80, for 40, 80 and 160 levels: in closed form, to two digits.
        ("training", 1, (7.0e-2, 3.5e-2, 1.8e-2)),
        ("ddim", 1, (7.0e-2, 3.5e-2, 1.8e-2)),
        ("heun", 2, (9.8e-3, 2.3e-3, 5.7e-4)),
    ],
)
def test_the_optimum_at_so_many_levels_has_its_order(
    kind: str, order: int, errors: tuple[float, ...]
) -> None:
    """Song et al. 2023, theorem 1: what a perfectly trained network converges to, and how fast.
    The optimum at a level is the one at the next, where a step leads."""
    found: list[float] = []
    for count in (39, 79, 159):
        ends = torch.tensor([MEAN, MEAN + 1.0], dtype=torch.float64).view(2, 1, 1, 1)
        levels = karras(count)
        for here, there in pairwise(levels):
            ends = step_of(kind, ends, rows(here, here), rows(there, there))
        true = exact(ends.new_tensor(MEAN + 1.0), LAST) - MEAN
        found.append(abs(((ends[1] - ends[0]) / true - 1).item()))
    assert found == pytest.approx(errors, rel=0.04)
    assert math.log2(found[1] / found[2]) == pytest.approx(order, abs=0.15)


def test_the_consistency_function_is_x_at_the_data_and_the_estimate_in_noise() -> None:
    x, x0 = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    ends = rows(VP.level(0.0), VP.level(999.0))
    answer = consistency(x, x0, ends)
    assert torch.equal(answer[0], x[0])
    assert (answer[1] - x0[1]).abs().max() < 1e-3
    levels = consistency_levels(VP, 50)
    assert [level.t for level in levels][:2] == [999.0, 979.0]
    assert [level.t for level in levels][-2:] == [19.0, 0.0]


def test_the_guided_target_is_classifier_free_guidance_on_a_mixture() -> None:
    """Two labels: at scale w the student learns what guidance makes of two exact estimates."""
    label, data = (
        mixture([1], [[0.8, -0.4]], [0.3]),
        mixture([1, 2], [[0.8, -0.4], [-1, 0]], [0.3, 0.5]),
    )
    exactly = {"positive": label, "negative": data}

    def both(x: Tensor, level: NoiseLevel, branches: Sequence[Branch]) -> tuple[Estimate, ...]:
        return tuple(exactly[branch.role](x, level) for branch in branches)

    x = NoiseStreams(0, count=3).draw((2, 4, 4)).double()
    level, condition = VP.level(600.0), Condition(states=torch.zeros(3, 1, 1))
    scales = [1.0, 2.5, 7.0]
    target = guided(label(x, level).x0, data(x, level).x0, torch.tensor(scales))
    for row, scale in enumerate(scales):
        run = classifier_free(both, condition, condition, scale=scale)
        assert (target[row] - run(x, level).x0[row]).abs().max() <= 1e-12
    assert (target[2] - target[0]).abs().max() > 0.1

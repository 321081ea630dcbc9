"""Step by step, the solvers of higher order against diffusers' schedulers of the same method.

Where diffusers deviates:

- DPMSolverMultistep of order 3 (as the authors' code and k-diffusion) adds half of the second
  derivative; `test_their_third_order_is_of_order_2` shows what that costs.
- DEIS, UniPC and DPMSolver lower their order in the last steps of a run shorter than 15 (UniPC, of
  any run); ours only in the step to clean data. DEIS takes log(0) in a longer run's step to clean
  data, UniPC with B1(h) infinity times 0. Compared are the steps before.
- DPMSolverSinglestep takes its inner levels from the timetable: it is given ours with their
  middles. As "dpmsolver" it does not go to clean data. Its third order has another second stage
  than algorithm 2 of the paper.
- PNDM averages a network's v, not the noise that each v means at its own level.
- SASolver of order 2 adds a term that its paper does not have: see `every_scheduler.py`.
- IPNDM has a schedule of its own, divides by alpha = 0 in its first step, and reads every output
  as v; it is given our levels.
- TCD and LCM round their inner times and end at t = 0.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_ipndm import IPNDMScheduler
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import (
    KDPM2AncestralDiscreteScheduler,
)
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_tcd import TCDScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from parity.every_scheduler import TheirThirdOrder
from schedulers import (
    CONFIG,
    PREDICTION_TYPES,
    VP,
    assert_equal_trails,
    build,
    follows,
    ours,
    theirs,
    visits,
)

from latentdiff import solvers
from latentdiff.diffusion import sampling, timetable
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian
from latentdiff.diffusion.prediction import Prediction
from latentdiff.diffusion.timetable import Timetable
from latentdiff.solvers import LCM, TCD, DPMpp3M, UniPC

predictions = pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
LEVELS = timetable.create("karras", VP, 16)


@predictions
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_lms(prediction: Prediction, spacing: str) -> None:
    levels = timetable.create(spacing, VP, 12)
    other = theirs(build(LMSDiscreteScheduler, prediction, spacing), lambda s: visits(s, levels))
    assert_equal_trails(ours(solvers.create("lms"), levels, prediction), other)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("dpm2", KDPM2DiscreteScheduler), ("dpm2-a", KDPM2AncestralDiscreteScheduler)],
)
def test_dpm2(prediction: Prediction, name: str, scheduler: type) -> None:
    levels = timetable.create("trailing", VP, 10)
    other = theirs(build(scheduler, prediction, "trailing"), lambda s: s.set_timesteps(10))
    assert_equal_trails(ours(solvers.create(name, VP), levels, prediction), other)


@predictions
def test_deis(prediction: Prediction) -> None:
    scheduler = build(DEISMultistepScheduler, prediction, "trailing", solver_order=3)
    other = theirs(scheduler, lambda s: follows(s, LEVELS))
    assert_equal_trails(ours(solvers.create("deis"), LEVELS, prediction)[:-1], other[:-1])


@predictions
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_unipc(prediction: Prediction, variant: Any, degree: int) -> None:
    scheduler = build(
        UniPCMultistepScheduler,
        prediction,
        "trailing",
        solver_order=degree,
        solver_type=variant,
        final_sigmas_type="zero",
    )
    other = theirs(scheduler, lambda s: follows(s, LEVELS))
    until = len(other) - (2 if degree == 3 else 1 if variant == "bh1" else 0)
    mine = ours(UniPC(degree, variant), LEVELS, prediction)
    assert_equal_trails(mine[:until], other[:until])


@predictions
def test_dpmpp_2m_sde(prediction: Prediction) -> None:
    scheduler = build(
        DPMSolverMultistepScheduler, prediction, "trailing", algorithm_type="sde-dpmsolver++"
    )
    other = theirs(scheduler, lambda s: follows(s, LEVELS))
    assert_equal_trails(ours(solvers.create("dpmpp-2m-sde"), LEVELS, prediction), other)


def test_their_third_order_is_of_order_2() -> None:
    scheduler = build(DPMSolverMultistepScheduler, "eps", "trailing", solver_order=3)
    other = theirs(scheduler, lambda s: follows(s, LEVELS))
    assert_equal_trails(ours(TheirThirdOrder(), LEVELS, "eps"), other)
    assert measured_order(TheirThirdOrder()) == pytest.approx(2, abs=0.15)
    assert measured_order(DPMpp3M()) > 2.85


def measured_order(solver: DPMpp3M) -> float:
    """On a Gaussian, whose probability flow is known, after a short first step."""
    data = Gaussian(torch.tensor([0.7]).double(), torch.tensor([[0.3]]).double())
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    errors = []
    for steps in (100, 200):
        h = math.log(50) / steps
        first = 5 * math.exp(-(h**1.5))
        levels = [VP.level_of_ratio(5.0)]
        levels += [VP.level_of_ratio(r) for r in np.geomspace(first, 0.1, steps).tolist()]
        got = sampling.sample(data, solver, levels, x, noise=NoiseStreams(0))
        errors.append((got - data.flow(x, levels[0], levels[-1])).abs().max().item())
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(("name", "kind"), [("dpm2", "dpmsolver"), ("dpmpp-2s", "dpmsolver++")])
def test_single_step(name: str, kind: Any) -> None:
    levels = timetable.create("exponential", VP, 8)
    halves = [VP.level_of_ratio(math.sqrt(a.ratio * b.ratio)) for a, b in pairwise(levels[:-1])]
    finer: Timetable = [
        level for pair in zip(levels, halves, strict=False) for level in pair
    ] + list(levels[-2:])
    scheduler = DPMSolverSinglestepScheduler(
        **CONFIG, algorithm_type=kind, final_sigmas_type="sigma_min", lower_order_final=True
    )
    other = theirs(scheduler, lambda s: follows(s, finer))
    assert_equal_trails(ours(solvers.create(name, VP), levels, "eps")[:-1], other[1:-1:2])


@pytest.mark.parametrize("name", ["plms", "pndm"])
def test_pseudo_numerical_methods(name: str) -> None:
    levels = timetable.create("leading", VP, 20)
    plms = name == "plms"
    scheduler = build(PNDMScheduler, "eps", "leading", skip_prk_steps=plms, set_alpha_to_one=True)
    other = theirs(scheduler, lambda s: s.set_timesteps(20))
    other = other[1:] if plms else [*other[3:12:4], *other[12:]]
    assert_equal_trails(ours(solvers.create(name, VP), levels, "eps"), other)


def test_ipndm() -> None:
    def prepare(scheduler: Any) -> None:
        scheduler.set_timesteps(len(LEVELS) - 1)
        scheduler.alphas = torch.tensor([level.alpha for level in LEVELS])
        scheduler.betas = torch.tensor([level.sigma for level in LEVELS])
        scheduler.timesteps = torch.tensor([level.t for level in LEVELS[:-1]])

    other = theirs(IPNDMScheduler(), prepare)
    assert_equal_trails(ours(solvers.create("ipndm"), LEVELS, "v"), other)


@predictions
def test_lcm(prediction: Prediction) -> None:
    scheduler = LCMScheduler(**CONFIG, prediction_type=PREDICTION_TYPES[prediction])
    other = theirs(scheduler, lambda s: s.set_timesteps(4))
    levels = [*(VP.level(float(t)) for t in scheduler.timesteps), VP.data_level()]
    assert_equal_trails(ours(LCM(), levels, prediction), other)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_tcd(gamma: float) -> None:
    times = [979, 700, 500, 240]
    scheduler = TCDScheduler(**CONFIG)
    other = theirs(scheduler, lambda s: s.set_timesteps(timesteps=times), eta=gamma)
    levels = [*(VP.level(t) for t in times), VP.data_level()]
    assert_equal_trails(ours(TCD(VP, gamma), levels, "eps")[:-1], other[:-1])

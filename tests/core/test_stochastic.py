"""Stochastic solvers: the mean and covariance they end with, within their Monte-Carlo error."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import (
    KDPM2AncestralDiscreteScheduler,
)
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_sasolver import SASolverScheduler
from diffusers.schedulers.scheduling_tcd import TCDScheduler
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from latentdiff import solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.denoiser import Estimate
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian
from latentdiff.diffusion.process import Flow, NoiseLevel, Process
from latentdiff.diffusion.timetable import Timetable
from latentdiff.solvers import (
    DDIM,
    DDPM,
    DPM2,
    TCD,
    Churn,
    DPMpp2M,
    DPMpp2S,
    DPMpp3M,
    Euler,
    Heun,
    PredictorCorrector,
    SASolver,
    Solver,
)
from latentdiff.solvers.diffusers_scheduler import DiffusersScheduler

SIDE = 72  # one picture of 5,184 pixels is as many independent draws
MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64)
ANISOTROPIC = Gaussian(MEAN, COVARIANCE)
POINT = Gaussian(MEAN, torch.zeros(2, 2, dtype=torch.float64))
STANDARD = Gaussian(torch.zeros_like(MEAN), torch.eye(2, dtype=torch.float64))


def stochastic(where: Process, steps: int) -> dict[str, Solver]:
    churn = Churn(where, s_churn=10, steps=steps, s_min=0.05, s_max=20)
    return {
        "ddpm": solvers.create("ddpm"),
        "ddpm-large": DDPM("fixed-large"),
        "ddim-half": DDIM(eta=0.5),
        "euler-a": solvers.create("euler-a"),
        "euler-churn": Euler(churn),
        "heun-churn": Heun(churn),
        **{name: solvers.create(name, where) for name in FURTHER},
    }


FURTHER = ["dpm2-a", "dpmpp-sde", "dpmpp-2m-sde", "dpmpp-3m-sde", "sa-solver", "euler-maruyama"]
NAMES = list(stochastic(process.create("ve"), 1))
EXACT = [name for name in NAMES if name not in ("ddpm-large", "euler-maruyama")]


def run(data: Gaussian, solver: Solver, levels: Timetable) -> Tensor:
    """The draws [C, N] at the last level, from exact draws at the first."""
    noise = NoiseStreams(11)
    start = levels[0]
    std = (data.variances[0] * start.alpha**2 + start.sigma**2).sqrt()
    x = torch.einsum("cd,bdhw->bchw", data.axes[0] * std, noise.draw((2, SIDE, SIDE)).double())
    x = x + start.alpha * data.means[0][:, None, None]
    return sampling.sample(data, solver, levels, x, noise=noise)[0].flatten(1)


def assert_law(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Mean and covariance of the draws [C, N] within 4.5 of their standard errors."""
    count = draws.shape[1]
    variance = covariance.diagonal()
    mean_error = (variance / count).sqrt()
    covariance_error = ((torch.outer(variance, variance) + covariance**2) / count).sqrt()
    assert ((draws.mean(1) - mean).abs() / mean_error).max() < 4.5
    assert ((torch.cov(draws) - covariance).abs() / covariance_error).max() < 4.5


class Probe(NoiseStreams):
    """Noise that is known: draw k is a unit along each channel for two pixels of its own."""

    def __init__(self, pixels: int) -> None:
        super().__init__(0)
        self.pixels, self.next = pixels, 3

    def draw(self, shape: Sequence[int]) -> Tensor:
        drawn = torch.zeros(1, 2, 1, self.pixels)
        drawn[0, :, 0, self.next : self.next + 2] = torch.eye(2)
        self.next += 2
        return drawn


def exact_law(solver: Solver, levels: Timetable) -> tuple[Tensor, Tensor]:
    """Mean and covariance at the last level of a run on Gaussian data, without drawing any.

    On such data a run is affine in its first x and in each of its draws, two a step at most. The
    first pixel is without either, the next two begin with a unit, the others have a unit drawn.
    """
    noise = Probe(3 + 4 * len(levels))
    x = torch.zeros(1, 2, 1, noise.pixels, dtype=torch.float64)
    x[0, :, 0, 1:3] = torch.eye(2)
    out = sampling.sample(ANISOTROPIC, solver, levels, x, noise=noise)[0, :, 0]
    shift, matrix, draws = out[:, :1], out[:, 1:3] - out[:, :1], out[:, 3:] - out[:, :1]
    start = levels[0]
    covariance = start.alpha**2 * COVARIANCE + start.sigma**2 * torch.eye(2).double()
    mean = start.alpha * matrix @ MEAN + shift[:, 0]
    return mean, matrix @ covariance @ matrix.T + draws @ draws.T


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in NAMES
        for kind in ("vp-continuous", "ve", "flow")
        if (name, kind) != ("euler-maruyama", "ve")  # its error changes sign at these steps
    ],
)
def test_weak_order_is_the_declared_one(name: str, kind: str) -> None:
    """The exact law that a run ends with comes to that of the data at the declared order.

    SA-Solver's error still falls by its cube here: on linear data its quadratic term is small.
    """
    where = process.create(kind)
    errors = []
    for steps in (96, 192):
        solver = stochastic(where, steps)[name]
        ratios = np.geomspace(5, 0.1, steps + 1).tolist()
        levels = [where.level_of_ratio(ratio) for ratio in ratios]
        end = levels[-1]
        mean, covariance = exact_law(solver, levels)
        truth = end.alpha**2 * COVARIANCE + end.sigma**2 * torch.eye(2).double()
        if solver.order == 1 and name not in FURTHER:
            assert (mean - end.alpha * MEAN).abs().max() < 1e-9
        errors.append((covariance - truth).abs().max().item())
    measured = math.log2(errors[0] / errors[1])
    assert measured > solver.order - 0.15, errors
    assert measured < solver.order + 0.15 or name == "sa-solver", errors


@pytest.mark.parametrize("kind", ["vp-scaled-linear", "edm"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FURTHER])
def test_final_law_is_that_of_the_data(name: str, kind: str) -> None:
    """500 steps down to clean data, where a first-order bias is below the Monte-Carlo error."""
    where = process.create(kind)
    levels = timetable.create("karras", where, 500)
    draws = run(ANISOTROPIC, stochastic(where, 500)[name], levels)
    assert_law(draws, MEAN, COVARIANCE)


@pytest.mark.parametrize("name", ["dpmpp-3m-sde", "dpmpp-2m-sde", "sa-solver"])
def test_karras_on_the_cosine_schedule_ends_with_the_law_of_the_data(name: str) -> None:
    """It begins at sigma / alpha of 20,000; spaced from there on, the last steps are too long."""
    where = process.create("vp-cosine")
    levels = timetable.create("karras", where, 40)
    spaced = timetable.ramp("karras", levels[0].ratio, levels[-2].ratio, 40).tolist()
    uncapped = [*map(where.level_of_ratio, spaced), levels[-1]]
    errors = [
        (exact_law(solvers.create(name, where), each)[1] - COVARIANCE).abs().max().item()
        for each in (levels, uncapped)
    ]
    assert errors[0] < 0.05
    assert errors[1] > 5 * errors[0]


@pytest.mark.parametrize("kind", ["vp-linear-zsnr", "ve", "flow"])
@pytest.mark.parametrize("name", EXACT)
def test_few_steps_are_exact_for_one_picture(name: str, kind: str) -> None:
    """With a certain x_0 each step must land on q(x_t | x_0) exactly, however long it is."""
    where = process.create(kind)
    levels = [where.level(where.t_max), where.level_of_ratio(3), where.level_of_ratio(0.4)]
    draws = run(POINT, stochastic(where, 2)[name], levels)
    end = levels[-1]
    assert_law(draws, end.alpha * MEAN, end.sigma**2 * torch.eye(2).double())


@pytest.mark.parametrize("kind", ["vp-linear-zsnr", "vp-continuous"])
def test_fixed_large_is_exact_for_standard_noise(kind: str) -> None:
    """Ho et al. 2020, section 3.2: sigma_t^2 = beta_t is optimal for x_0 of N(0, I)."""
    where = process.create(kind)
    levels = [where.level(where.t_max), where.level_of_ratio(3), where.level_of_ratio(0.4)]
    draws = run(STANDARD, DDPM("fixed-large"), levels)
    assert_law(draws, torch.zeros(2).double(), torch.eye(2).double())


def test_churn_raises_the_level_as_edm_says() -> None:
    """gamma = min(S_churn / N, sqrt(2) - 1) inside [S_min, S_max], never above the noisiest."""
    edm = process.create("edm")
    seen: list[float] = []

    def watch(x: Tensor, level: NoiseLevel) -> Estimate:
        assert level.t == pytest.approx(math.log(level.sigma) / 4)
        seen.append(level.sigma)
        return Estimate(0.0 * x)

    solver = Euler(Churn(edm, s_churn=3, steps=10, s_min=0.5, s_max=90))
    levels = [edm.level_of_ratio(sigma) for sigma in (80.0, 70.0, 4.0, 0.6, 0.4)]
    x = torch.zeros(1, 1, 2, 2)
    sampling.sample(watch, solver, [*levels, edm.data_level()], x, noise=NoiseStreams(0))
    assert seen == pytest.approx([80, 80, 5.2, 0.78, 0.4])
    seen.clear()
    hot = Euler(Churn(edm, s_churn=30, steps=10))
    sampling.sample(watch, hot, [levels[2], edm.data_level()], x, noise=NoiseStreams(0))
    assert seen == pytest.approx([4 * math.sqrt(2)])


def test_churn_noise_is_inflated_by_s_noise() -> None:
    edm, seen = process.create("edm"), []

    def watch(x: Tensor, level: NoiseLevel) -> Estimate:
        seen.append(x)
        return Estimate(0.0 * x)

    here = edm.level_of_ratio(2.0)
    x = torch.zeros(1, 1, 4, 4)
    solver = Heun(Churn(edm, s_churn=1, steps=4, s_noise=1.5))
    sampling.sample(watch, solver, [here, edm.data_level()], x, noise=NoiseStreams(5))
    added = math.sqrt(2.5**2 - 2.0**2) * NoiseStreams(5).draw((1, 4, 4))
    torch.testing.assert_close(seen[0], 1.5 * added)


def test_langevin_corrections_keep_the_law() -> None:
    """Unadjusted Langevin steps inflate the variance by about snr^2 = 2.6 %, and no more."""
    where = process.create("ve")
    levels = timetable.create("karras", where, 60)
    draws = run(ANISOTROPIC, solvers.create("pc"), levels)
    assert (draws.mean(1) - MEAN).abs().max() < 0.06
    assert (torch.cov(draws) - COVARIANCE).abs().max() < 0.08


def test_annealed_langevin_comes_near_the_data() -> None:
    """30 levels of 20 steps leave 18.4 % too much variance: the recursion of a Gaussian's variance,
    V <- (1 - a / (2 (v + sigma^2)))^2 V + a with a = 0.2 sigma^2, followed by x_0."""
    where = process.create("ve")
    levels = timetable.create("exponential", where, 30)
    draws = run(ANISOTROPIC, solvers.create("annealed-langevin"), levels)
    assert_law(draws, MEAN, 1.184 * COVARIANCE)


def test_recovery_langevin_comes_near_the_data() -> None:
    """Each step draws from a Gaussian conditional, whose variance 30 steps of size 0.2 leave a few
    hundredths too large where the data are as wide as their unit variance says, or narrower."""
    where = process.create("vp-cosine")
    levels = timetable.create("trailing", where, 10)
    draws = run(ANISOTROPIC, solvers.create("recovery-langevin"), levels)
    assert_law(draws, MEAN, COVARIANCE)


@pytest.mark.parametrize("name", ["consistency", "tcd"])
def test_few_step_solvers_are_exact_for_one_picture(name: str) -> None:
    """Their networks are distilled for an x_0 that is right at every level."""
    where = process.create("vp-linear-zsnr")
    levels = [where.level(where.t_max), where.level_of_ratio(3), where.level_of_ratio(0.4)]
    draws = run(POINT, solvers.create(name, where), levels)
    end = levels[-1]
    assert_law(draws, end.alpha * MEAN, end.sigma**2 * torch.eye(2).double())


def declared(where: Process) -> dict[str, Solver]:
    """Every named solver, and those whose settings decide about noise, with both answers."""
    settings: dict[str, Solver] = {
        "ddim eta 0": DDIM(eta=0.0),
        "ddim eta small": DDIM(eta=0.01),
        "ddpm large": DDPM("fixed-large"),
        "euler churn": Euler(Churn(where, s_churn=1, steps=10)),
        "euler no churn": Euler(Churn(where, s_churn=0, steps=10)),
        "heun churn": Heun(Churn(where, s_churn=1, steps=10)),
        "heun no churn": Heun(Churn(where, s_churn=0, steps=10)),
        "dpm2 eta": DPM2(where, eta=0.3),
        "2s eta": DPMpp2S(where, eta=0.3),
        "2m eta": DPMpp2M(eta=0.3),
        "3m eta": DPMpp3M(eta=0.3),
        "sa tau 0": SASolver(tau=0.0),
        "sa tau small": SASolver(tau=0.1),
        "tcd gamma 0": TCD(where, gamma=0.0),
        "tcd gamma 1": TCD(where, gamma=1.0),
        "pc of an ode": PredictorCorrector(DDIM()),
    }
    return {**{name: solvers.create(name, where) for name in solvers.names()}, **settings}


@pytest.mark.parametrize("kind", ["vp-scaled-linear", "flow"])
@pytest.mark.parametrize("name", declared(process.create("ve")))
def test_a_solver_says_whether_it_draws_noise(name: str, kind: str) -> None:
    """One step, and then those after it, from one x with two different noise streams."""
    where = process.create(kind)
    solver = declared(where)[name]
    levels = [where.level_of_ratio(ratio) for ratio in (4.0, 2.0, 1.0, 0.5)]
    x = NoiseStreams(9).draw((2, 3, 3)).double() * levels[0].sigma
    for count in (2, 4):
        one, other = (
            sampling.sample(ANISOTROPIC, solver, levels[:count], x, noise=NoiseStreams(seed))
            for seed in (1, 2)
        )
        assert bool((one != other).any()) == solver.stochastic


@cache
def foreign() -> dict[str, tuple[Any, str]]:
    """diffusers' schedulers that the adapter runs, and the processes they are of."""
    plain = [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler]
    plain += [DEISMultistepScheduler, KDPM2DiscreteScheduler, LMSDiscreteScheduler]
    plain += [DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler]
    noisy = [DDPMScheduler, EulerAncestralDiscreteScheduler, KDPM2AncestralDiscreteScheduler]
    noisy += [LCMScheduler, TCDScheduler, SASolverScheduler]
    of_sde = [DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler]
    betas: Any = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    cells = {kind.__name__: (kind(**betas), "vp") for kind in [*plain, *noisy]}
    for kind in of_sde:
        made = kind(**betas, algorithm_type="sde-dpmsolver++")
        cells[f"{kind.__name__} sde"] = (made, "vp")
    flow = FlowMatchEulerDiscreteScheduler
    return cells | {
        "UnCLIPScheduler": (UnCLIPScheduler(), "cosine"),
        "FlowMatchEulerDiscrete": (flow(), "flow"),
        "FlowMatchEulerDiscrete stochastic": (flow(stochastic_sampling=True), "flow"),
        "FlowMatchLCM": (FlowMatchLCMScheduler(), "flow"),
    }


@pytest.mark.parametrize("name", foreign())
def test_a_foreign_scheduler_says_so_too(name: str) -> None:
    scheduler, kind = foreign()[name]
    where = Flow(1000.0) if kind == "flow" else process.create("vp-scaled-linear")
    where = process.create("vp-cosine") if kind == "cosine" else where
    solver = DiffusersScheduler(scheduler, where, 6)
    levels = solver.timetable()
    data = Gaussian(MEAN.float(), COVARIANCE.float())
    x = NoiseStreams(9).draw((2, 3, 3))
    one, other = (
        sampling.sample(data, solver, levels[:5], x, noise=NoiseStreams(seed)) for seed in (1, 2)
    )
    assert bool((one != other).any()) == solver.stochastic

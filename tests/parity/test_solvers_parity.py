"""Step by step, the solvers, betas and timetables against diffusers' schedulers.

One input-dependent fake network serves both sides, and noise comes from the same torch generator.
Compared is x_t after every step, relative to its largest value. Where diffusers deviates:

- DDIM and DDPM step to t - T // steps, which is the next visited time only if steps divides T and
  the spacing is "leading" or "trailing"; "linspace" is compared in its times alone.
- DDPM with fixed large variance and "trailing" adds noise in the step to clean data; ours does not.
- DPMSolverMultistep spaces "leading" and "linspace" over one step more than DDIM does; it is given
  its times as "trailing" and "karras". With Karras sigmas it tells the network rounded times; in
  that test ours are rounded too.
- A single step of "linspace" is t = 0 there; ours is the noise end.
- With zero terminal SNR the sigma-space schedulers begin at sigma 4096, not at pure noise; only
  DDIM is compared there.
"""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from schedulers import (
    CONFIG,
    SEED,
    VP,
    assert_equal_trails,
    build,
    initial,
    network,
    ours,
    theirs,
    visits,
)
from torch import Tensor

from latentdiff import solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.denoiser import network_denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.prediction import Prediction
from latentdiff.diffusion.process import DiscreteVP, NoiseLevel
from latentdiff.errors import UserError
from latentdiff.solvers import DDIM, DDPM
from latentdiff.solvers.diffusers_scheduler import DiffusersScheduler

predictions = pytest.mark.parametrize("prediction", ["eps", "v", "x0"])


@predictions
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0)])
def test_ddim(prediction: Prediction, eta: float, spacing: str, offset: int) -> None:
    levels = timetable.create(spacing, VP, 20, steps_offset=offset)
    scheduler = build(DDIMScheduler, prediction, spacing, clip_sample=False, steps_offset=offset)
    other = theirs(scheduler, lambda s: visits(s, levels), eta=eta)
    assert_equal_trails(ours(DDIM(eta), levels, prediction), other)


def test_ddim_from_zero_terminal_snr() -> None:
    where = process.create("vp-scaled-linear-zsnr")
    levels = timetable.create("trailing", where, 10)
    scheduler = build(
        DDIMScheduler, "v", "trailing", clip_sample=False, rescale_betas_zero_snr=True
    )
    other = theirs(scheduler, lambda s: visits(s, levels))
    assert_equal_trails(ours(DDIM(), levels, "v", where), other)


@predictions
@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
def test_ddpm(prediction: Prediction, variance: Any) -> None:
    levels = timetable.create("leading", VP, 20)
    name = variance.replace("-", "_")
    scheduler = build(DDPMScheduler, prediction, "leading", clip_sample=False, variance_type=name)
    other = theirs(scheduler, lambda s: visits(s, levels))
    assert_equal_trails(ours(DDPM(variance), levels, prediction), other)


def test_ddpm_with_a_learned_variance() -> None:
    """One network of 2C outputs; the second half is its own function of x and t."""

    def double(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([network(x, t), network(x.flip(3), t)], 1)

    levels = timetable.create("leading", VP, 20)
    scheduler = build(
        DDPMScheduler, "eps", "leading", clip_sample=False, variance_type="learned_range"
    )
    other = theirs(scheduler, lambda s: visits(s, levels), model=double)
    for solver in (DDPM(), DDPM("learned-range"), DiffusersScheduler(scheduler, VP, 20)):
        mine: list[Tensor] = []
        sampling.sample(
            network_denoiser(double, VP, "eps"),
            solver,
            levels,
            initial(),
            noise=NoiseStreams(SEED),
            callback=lambda index, level, x, trail=mine: trail.append(x),
        )
        assert_equal_trails(mine, other)
    with pytest.raises(UserError, match="learned-range"):
        ours(DDPM("learned-range"), levels, "eps")


@predictions
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras"])
def test_euler(prediction: Prediction, spacing: str) -> None:
    levels = timetable.create(spacing, VP, 10)
    scheduler = build(EulerDiscreteScheduler, prediction, spacing)
    other = theirs(scheduler, lambda s: visits(s, levels))
    assert_equal_trails(ours(solvers.create("euler"), levels, prediction), other)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_euler_ancestral(prediction: Prediction, spacing: str) -> None:
    levels = timetable.create(spacing, VP, 10)
    scheduler = build(EulerAncestralDiscreteScheduler, prediction, spacing)
    other = theirs(scheduler, lambda s: visits(s, levels))
    assert_equal_trails(ours(solvers.create("euler-a"), levels, prediction), other)


@predictions
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras"])
def test_heun(prediction: Prediction, spacing: str) -> None:
    levels = timetable.create(spacing, VP, 10)
    scheduler = build(HeunDiscreteScheduler, prediction, spacing)
    other = theirs(scheduler, lambda s: visits(s, levels))
    assert_equal_trails(ours(solvers.create("heun"), levels, prediction), other)


@predictions
@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_dpmpp_2m(prediction: Prediction, steps: int, spacing: str) -> None:
    levels = timetable.create(spacing, VP, steps)
    levels = [replace(level, t=float(round(level.t))) for level in levels]
    scheduler = build(DPMSolverMultistepScheduler, prediction, spacing)
    other = theirs(scheduler, lambda s: visits(s, levels))
    assert_equal_trails(ours(solvers.create("dpmpp-2m"), levels, prediction), other)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 7, 20, 50, 999, 1000])
def test_times(spacing: str, steps: int) -> None:
    """Also where steps does not divide 1000: DDIM's whole times, to the last one."""
    visits(build(DDIMScheduler, "eps", spacing), timetable.create(spacing, VP, steps))


def test_exponential_sigmas() -> None:
    levels = timetable.create("exponential", VP, 12)
    scheduler = EulerDiscreteScheduler(**CONFIG, use_exponential_sigmas=True)
    visits(scheduler, levels)
    np.testing.assert_allclose([x.ratio for x in levels], scheduler.sigmas.numpy(), rtol=1e-4)


@pytest.mark.parametrize("zsnr", [False, True])
@pytest.mark.parametrize(
    ("name", "schedule", "ends"),
    [
        ("vp-linear", "linear", (0.0001, 0.02)),
        ("vp-scaled-linear", "scaled_linear", (0.00085, 0.012)),
        ("vp-cosine", "squaredcos_cap_v2", (0.0001, 0.02)),
        ("vp-sigmoid", "sigmoid", (0.0001, 0.02)),
    ],
)
def test_betas(name: str, schedule: Any, ends: tuple[float, float], zsnr: bool) -> None:
    where = cast(DiscreteVP, process.create(name + "-zsnr" * zsnr))
    scheduler = DDPMScheduler(
        beta_schedule=schedule,
        beta_start=ends[0],
        beta_end=ends[1],
        rescale_betas_zero_snr=zsnr,
    )
    expected = scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(where.alphas_cumprod, expected, rtol=2e-4, atol=2e-7)


def test_a_level_is_what_their_add_noise_makes() -> None:
    x0, noise = initial(), torch.randn(initial().shape, generator=torch.Generator().manual_seed(1))
    scheduler = DDPMScheduler(**CONFIG)
    for t in (0, 500, 999):
        level: NoiseLevel = VP.level(t)
        expected = scheduler.add_noise(x0, noise, torch.IntTensor([t]))
        torch.testing.assert_close(level.alpha * x0 + level.sigma * noise, expected)

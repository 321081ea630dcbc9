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

from collections.abc import Callable
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
from torch import Tensor

from latentdiff import process, sampling, solvers, timetable
from latentdiff.denoiser import network_denoiser
from latentdiff.noise import NoiseStreams
from latentdiff.prediction import Prediction
from latentdiff.process import DiscreteVP, NoiseLevel
from latentdiff.solvers import DDIM, DDPM, Solver
from latentdiff.timetable import Timetable

SHAPE = (4, 8, 8)
SEED = 7
TOLERANCE = 1e-4
VP = process.create("vp-scaled-linear")
CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
PREDICTION_TYPES: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def network(x: Tensor, t: Tensor) -> Tensor:
    """Depends on every input pixel and on the time, nonlinearly; of unit size, as eps and v are."""
    mixed = x + 0.5 * x.roll(1, dims=1) - 0.3 * x.roll(1, dims=3) + x.mean((1, 2, 3), keepdim=True)
    return torch.tanh(0.8 * mixed + torch.sin(t / 150).view(-1, 1, 1, 1))


def initial() -> Tensor:
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(99))


def ours(
    solver: Solver, levels: Timetable, prediction: Prediction, where: process.Process = VP
) -> list[Tensor]:
    """x_t after every step."""
    trail: list[Tensor] = []
    sampling.sample(
        network_denoiser(network, where, prediction),
        solver,
        levels,
        initial(),
        noise=NoiseStreams(SEED),
        callback=lambda index, level, x: trail.append(x),
    )
    return trail


def theirs(scheduler: Any, prepare: Callable[[Any], None], **step: Any) -> list[Tensor]:
    """x_t after every step: a sigma-space scheduler's sample, divided by sqrt(1 + sigma^2)."""
    prepare(scheduler)
    generator = torch.Generator().manual_seed(SEED)
    scaled = hasattr(scheduler, "sigmas") and not isinstance(scheduler, DPMSolverMultistepScheduler)
    x = initial()
    if scaled:
        x = x * (1 + scheduler.sigmas[0] ** 2) ** 0.5
    trail: list[Tensor] = []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        output = network(seen, t.float().expand(1))
        takes_noise = not isinstance(scheduler, HeunDiscreteScheduler)
        draws = {"generator": generator} if takes_noise else {}
        x = cast(Any, scheduler.step(output, t, x, **draws, **step)).prev_sample
        sigma = scheduler.sigmas[scheduler.step_index] if scaled else 0.0
        if not getattr(scheduler, "state_in_first_order", True) and sigma > 0:
            continue  # half a step of Heun's method
        trail.append(x / (1 + sigma**2) ** 0.5)
    return trail


def assert_equal_trails(mine: list[Tensor], other: list[Tensor]) -> None:
    assert len(mine) == len(other)
    for index, (a, b) in enumerate(zip(mine, other, strict=True)):
        error = (a - b).abs().max() / b.abs().max()
        assert error < TOLERANCE, f"step {index}: {error:.1e}"


def build(scheduler: type, prediction: Prediction, spacing: str, **config: Any) -> Any:
    karras = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    return scheduler(
        **{**CONFIG, "prediction_type": PREDICTION_TYPES[prediction], **karras, **config}
    )


def visits(scheduler: Any, levels: Timetable) -> None:
    """Both visit the same times."""
    scheduler.set_timesteps(len(levels) - 1)
    times = list(dict.fromkeys(scheduler.timesteps.tolist()))  # Heun lists each twice
    np.testing.assert_allclose([level.t for level in levels[:-1]], times, rtol=2e-4, atol=2e-3)


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
    x0, noise = initial(), torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    scheduler = DDPMScheduler(**CONFIG)
    for t in (0, 500, 999):
        level: NoiseLevel = VP.level(t)
        expected = scheduler.add_noise(x0, noise, torch.IntTensor([t]))
        torch.testing.assert_close(level.alpha * x0 + level.sigma * noise, expected)

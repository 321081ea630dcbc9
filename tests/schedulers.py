"""A fake network, our solvers and diffusers' schedulers, run side by side for the parity tests."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion import process, sampling
from latentdiff.diffusion.denoiser import network_denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.prediction import Prediction
from latentdiff.diffusion.timetable import Timetable
from latentdiff.solvers import Solver

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


def theirs(
    scheduler: Any,
    prepare: Callable[[Any], None],
    *,
    model: Callable[[Tensor, Tensor], Tensor] = network,
    **step: Any,
) -> list[Tensor]:
    """x_t after every step: a sigma-space scheduler's sample, divided by sqrt(1 + sigma^2)."""
    prepare(scheduler)
    generator = torch.Generator().manual_seed(SEED)
    scaled = hasattr(scheduler, "sigmas") and not hasattr(scheduler, "_sigma_to_alpha_sigma_t")
    x = initial()
    if scaled:
        x = x * (1 + scheduler.sigmas[0] ** 2) ** 0.5
    trail: list[Tensor] = []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        output = model(seen, t.float().expand(1))
        takes_noise = "generator" in inspect.signature(scheduler.step).parameters
        draws = {"generator": generator} if takes_noise else {}
        x = cast(Any, scheduler.step(output, t, x, **draws, **step)).prev_sample
        sigma = scheduler.sigmas[scheduler.step_index] if scaled else 0.0
        if not getattr(scheduler, "state_in_first_order", True) and sigma > 0:
            continue  # half a step of a two-stage method
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


def follows(scheduler: Any, levels: Timetable) -> None:
    """Have a scheduler in sigma visit exactly our levels, at our times."""
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = torch.tensor([level.ratio for level in levels])
    scheduler.timesteps = torch.tensor([level.t for level in levels[:-1]])

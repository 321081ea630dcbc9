"""Predictions: round trips, definitions, both ends, and a finite run from any of them."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latentdiff import solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.denoiser import network_denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.prediction import Prediction, target, to_x0

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
PROCESSES = {name: process.create(name) for name in process.names()}


def pair(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=generator)
    return x0, noise


@given(
    st.sampled_from(list(PROCESSES.values())),
    st.sampled_from(PREDICTIONS),
    st.floats(0.001, 0.99),
    st.integers(0, 100),
)
def test_round_trip(where: process.Process, prediction: Prediction, u: float, seed: int) -> None:
    """target -> x_0 -> eps gives back what x_t was made of, with numbers and with tensors."""
    x0, noise = pair(seed)
    level = where.level(where.t_min + u * (where.t_max - where.t_min))
    t = torch.full((3, 1, 1, 1), level.t, dtype=torch.float64)
    for alpha, sigma in ((level.alpha, level.sigma), where.alpha_sigma(t)):
        x_t = alpha * x0 + sigma * noise
        output = target(prediction, x0, noise, alpha, sigma)
        got = to_x0(prediction, output, x_t, alpha, sigma)
        # eps and score divide by alpha, EDM's sigma reaches 1e4 times alpha: float64 has room.
        torch.testing.assert_close(got, x0, rtol=1e-8, atol=1e-8)


def test_definitions() -> None:
    x0, noise = pair(0)
    torch.testing.assert_close(target("v", x0, noise, 0.8, 0.6), 0.8 * noise - 0.6 * x0)
    torch.testing.assert_close(target("flow", x0, noise, 0.3, 0.7), noise - x0)
    torch.testing.assert_close(target("score", x0, noise, 0.8, 0.5), -2 * noise)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_both_ends_are_finite(prediction: Prediction) -> None:
    """Pure noise: v, x0 and flow still know x_0; eps and score say 0. Clean data: x_t is x_0."""
    x0, noise = pair(1)
    known = x0 if prediction in ("v", "x0", "flow") else torch.zeros_like(x0)
    for zero, one in ((0.0, 1.0), (torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1))):
        output = target(prediction, x0, noise, zero, one)
        torch.testing.assert_close(to_x0(prediction, output, noise, zero, one), known)
        output = target(prediction, x0, noise, one, zero)
        torch.testing.assert_close(to_x0(prediction, output, x0, one, zero), x0)


def test_float64_coefficients_do_not_promote() -> None:
    x0, noise = (x.float() for x in pair(2))
    alpha, sigma = PROCESSES["flow"].alpha_sigma(torch.rand(3, 1, 1, 1))
    for prediction in PREDICTIONS:
        output = target(prediction, x0, noise, alpha, sigma)
        assert output.dtype == torch.float32
        assert to_x0(prediction, output, noise, alpha, sigma).dtype == torch.float32


@pytest.mark.parametrize("kind", process.names())
def test_every_run_is_finite(kind: str) -> None:
    """Each process with each solver, by a network that knows nothing.

    Predictions and timetables take turns, at another place for each process, so that each of them
    meets each solver.
    """
    where = PROCESSES[kind]
    turn = process.names().index(kind)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x.flip(1) + t.view(-1, 1, 1, 1) / where.t_max)

    for index, name in enumerate(solvers.names()):
        prediction = PREDICTIONS[(index + turn) % len(PREDICTIONS)]
        spacing = timetable.names()[(index + turn) % len(timetable.names())]
        levels = timetable.create(spacing, where, 3)
        noise = NoiseStreams(0, count=2)
        x = noise.draw((2, 2, 2)) * where.prior_scale(levels[0])
        denoise = network_denoiser(network, where, prediction)
        end = sampling.sample(denoise, solvers.create(name, where), levels, x, noise=noise)
        assert end.isfinite().all(), (prediction, spacing, name)

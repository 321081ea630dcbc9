"""Inversion and back, on closed-form data and through a real tiny model; slerp."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_bundle, unet_of
from torch import nn

from latentdiff import LatentDiffusionPipeline, solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.denoiser import Estimate
from latentdiff.diffusion.inversion import invert, slerp
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian, mixture
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError
from latentdiff.metrics.psnr import psnr
from latentdiff.pictures import to_tensor
from latentdiff.solvers import DDIM, DDPM, Euler, Heun, Solver

DATA = mixture([1, 2], [[0.0, 1.0], [1.0, -1.0]], [0.3, 0.5])
NOISE = NoiseStreams(0)
BUNDLE = tiny_bundle()


def points() -> torch.Tensor:
    return NoiseStreams(1).draw((2, 6, 6)).double()


@pytest.mark.parametrize("kind", ["vp-scaled-linear", "ve", "flow"])
@pytest.mark.parametrize("solver", [DDIM(), Euler(), Heun()])
def test_inverted_steps_are_undone_by_the_solver(kind: str, solver: Solver) -> None:
    where = process.create(kind)
    levels = [where.level_of_ratio(ratio) for ratio in np.geomspace(5, 0.05, 41).tolist()]
    x0 = points() * 0.5
    errors: list[float] = []
    for refinements in (0, 2, 8):
        noise = invert(DATA, solver, levels, x0, refinements=refinements)
        back = sampling.sample(DATA, solver, levels, noise, noise=NOISE)
        errors.append((back / levels[-1].alpha - x0).abs().max().item())
    assert errors[1] < 0.3 * errors[0]
    assert errors[2] < 1e-3


def test_a_gaussian_inverts_to_its_exact_noise() -> None:
    """The closed form of the flow, at order 2 with Heun's steps and at order 1 without."""
    data = Gaussian(torch.tensor([0.5, -1.0]).double(), torch.eye(2).double() * 0.7)
    where = process.create("vp-scaled-linear")
    orders: list[float] = []
    for refinements in (0, 6):
        errors: list[float] = []
        for steps in (20, 40):
            ratios = np.geomspace(5, 0.05, steps + 1).tolist()
            levels = [where.level_of_ratio(ratio) for ratio in ratios]
            got = invert(data, Heun(), levels, points(), refinements=refinements)
            exact = data.flow(levels[-1].alpha * points(), levels[-1], levels[0])
            errors.append((got - exact).abs().max().item())
        orders.append(math.log2(errors[0] / errors[1]))
    assert orders[0] == pytest.approx(1, abs=0.25)
    assert orders[1] == pytest.approx(2, abs=0.25)


def test_invert_and_return_through_the_pipeline() -> None:
    """At least 35 dB against the autoencoder's own reconstruction, at 50 steps without guidance."""
    pipe = LatentDiffusionPipeline(BUNDLE)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    noise = pipe.invert(picture, "a red heart")
    assert noise.shape == (1, 4, 8, 8)
    back = pipe(
        "a red heart",
        latents=noise,
        num_inference_steps=50,
        guidance_scale=1,
        solver="heun",
        timetable="karras",
        output_type="pt",
        progress=False,
    )
    bundle = pipe.bundle
    with torch.no_grad():
        known = bundle.autoencoder.decode(bundle.autoencoder.encode(to_tensor(picture)[None]))
    assert psnr(back.images * 2 - 1, known.clamp(-1, 1)).item() > 35


def test_slerp_keeps_the_length_of_noise() -> None:
    a, b = NoiseStreams([1, 2]).draw((4, 32, 32)), NoiseStreams([3, 4]).draw((4, 32, 32))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    half = slerp(a, b, 0.5)
    assert half.std() == pytest.approx(1, abs=0.03)
    assert ((a + b) / 2).std() < 0.75
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, b, 0.25), slerp(b, a, 0.75))


def never(x: torch.Tensor, level: NoiseLevel) -> Estimate:
    raise AssertionError("the network was called")


@pytest.mark.parametrize("name", solvers.names())
def test_a_solver_that_draws_noise_is_refused_before_the_network_is_called(name: str) -> None:
    """And every other one inverts; also in the pipeline, where its U-Net is watched."""
    where = process.create("vp-scaled-linear")
    solver = solvers.create(name, where)
    levels = [where.level_of_ratio(ratio) for ratio in (2.0, 1.0, 0.5)]
    if not solver.stochastic:
        assert torch.isfinite(invert(DATA, solver, levels, points())).all()
        return
    with pytest.raises(UserError, match="needs a solver that draws no noise"):
        invert(never, solver, levels, points())
    with pytest.raises(UserError, match="needs a solver that draws no noise"):
        invert(never, solver, levels, points(), refinements=0)
    pipe = LatentDiffusionPipeline(BUNDLE)
    with (
        watched(unet_of(BUNDLE)) as calls,
        pytest.raises(UserError, match="needs a solver that draws no noise"),
    ):
        pipe.invert(Image.new("RGB", (16, 16)), "a cat", solver=name, num_inference_steps=2)
    assert calls == []


@contextmanager
def watched(network: nn.Module) -> Iterator[list[int]]:
    """The number of rows of each of its calls."""
    calls: list[int] = []
    hook = network.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    try:
        yield calls
    finally:
        hook.remove()


def test_mistakes_are_named() -> None:
    levels = timetable.create("karras", process.create("flow"), 4)
    for solver, given, refinements, said in (
        (Heun(), [*levels, *levels], 1, "only goes down"),
        (Heun(), levels[-2:], 1, "two levels"),
        (Heun(), levels, -1, "refinements"),
        (DDPM(), levels, 1, "draws no noise"),
    ):
        with pytest.raises(UserError, match=said):
            invert(never, solver, given, points(), refinements=refinements)
    pipe = LatentDiffusionPipeline(BUNDLE)
    picture = Image.new("RGB", (16, 16))
    wrong: dict[str, Any] = {"image": 3, "prompt": 3, "solver": 3, "refinements": "a"}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=r"not (3|a|int)\.?$"):
            pipe.invert(**{"image": picture, name: value})

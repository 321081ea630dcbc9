"""Edits of pictures through the pipeline: what must not change does not; everything composes."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_bundle

from latentdiff import ILVR, Blend, LatentDiffusionPipeline, RePaint, SDEdit, solvers
from latentdiff.diffusion.edits import Edit
from latentdiff.editing.lowpass import low_pass
from latentdiff.pictures import to_tensor

RANDOM = np.random.default_rng(0)


@cache
def pipe() -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline(tiny_bundle())


def picture(width: int = 16, height: int = 16) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


def half_mask(width: int = 16, height: int = 16) -> Image.Image:
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


def drawn(
    *edits: Edit, steps: int = 3, solver: str = "ddim", scale: float = 1.0, seed: int = 5
) -> np.ndarray:
    output = pipe()(
        "a red heart",
        edits=edits,
        num_inference_steps=steps,
        solver=solver,
        guidance_scale=scale,
        seed=seed,
        progress=False,
    )
    return np.asarray(output.images[0])


# One solver of each kind always, first and second order, stochastic and multistep; all of them with
# `pytest -m slow`.
QUICK = ["ddim", "euler-a", "heun", "dpmpp-2m"]
REST = [name for name in solvers.names() if name not in QUICK]
SOLVERS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]
CASES = [*range(24), *(pytest.param(case, marks=pytest.mark.slow) for case in range(24, 200))]


@pytest.mark.parametrize("case", CASES)
def test_known_pixels_are_bit_identical(case: int) -> None:
    """Random sizes and masks, soft ones too, with every solver in turn."""
    random = np.random.default_rng(case)
    width, height = random.integers((1, 5), 24).tolist()
    given = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    mask = random.integers(0, 256, (height, width)) * (random.random((height, width)) < 0.5)
    hole = Image.fromarray(mask.astype(np.uint8))
    edit = RePaint(given, hole, resamples=2) if case % 2 else Blend(given, hole)
    names = QUICK if case < 24 else REST
    result = drawn(edit, steps=2, solver=names[case % len(names)], seed=case)
    assert result.shape == (height, width, 3)
    assert (result == np.asarray(given))[mask == 0].all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_known_whole_is_the_input_and_an_unknown_whole_is_plain(solver: str) -> None:
    given = picture()
    nothing, everything = Image.new("L", (16, 16), 0), Image.new("L", (16, 16), 255)
    plain = drawn(solver=solver)
    for edit in (RePaint(given, nothing, resamples=2), SDEdit(given, 0.7, mask=nothing)):
        assert (drawn(edit, solver=solver) == np.asarray(given)).all()
    for edit in (RePaint(given, everything), Blend(given, everything)):
        assert (drawn(edit, solver=solver) == plain).all()
    assert (drawn(SDEdit(given, 0.0), solver=solver) == np.asarray(given)).all()
    assert (drawn(SDEdit(given, 1.0), solver=solver) == plain).all()


def combinations(given: Image.Image) -> dict[str, list[Edit]]:
    late, hole, coarse = (
        SDEdit(given, 0.7),
        RePaint(given, half_mask(), jump_length=1, resamples=2),
        ILVR(given, factor=4),
    )
    return {
        "SDEdit": [late],
        "RePaint": [hole],
        "ILVR": [coarse],
        "SDEdit+RePaint": [late, hole],
        "RePaint+ILVR": [hole, coarse],
        "all": [late, hole, coarse],
    }


@pytest.mark.parametrize("scale", [3.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", combinations(picture()))
def test_every_edit_with_every_solver_and_guidance(name: str, solver: str, scale: float) -> None:
    given = picture()
    edits = combinations(given)[name]
    output = pipe()(
        "a red heart",
        edits=edits,
        num_inference_steps=4,
        solver=solver,
        guidance_scale=scale,
        seed=1,
        output_type="pt",
        progress=False,
    )
    assert bool(torch.isfinite(output.images).all())
    assert bool(torch.isfinite(output.latents).all())
    if "RePaint" in name or name == "all":
        known = output.images[0, :, :, :8]
        assert torch.equal(known, to_tensor(given)[:, :, :8] / 2 + 0.5)
    if "ILVR" in name or name == "all":
        reference = pipe().bundle.autoencoder.encode(to_tensor(given)[None])
        gap = low_pass(output.latents, 4) - low_pass(reference, 4)
        assert gap.square().mean().sqrt() < 1e-4

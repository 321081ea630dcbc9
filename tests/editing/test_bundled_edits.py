"""Edits on the bundled model: every edit with every solver, and inversion there and back.

`pytest` takes each solver once, the combinations in turn; `pytest -m slow` the whole matrix.
"""

from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.mark.structures import ParameterSet
from PIL import Image, ImageDraw

from latentdiff import ILVR, Control, LatentDiffusionPipeline, RePaint, SDEdit, solvers
from latentdiff.diffusion.edits import Edit
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.editing.lowpass import low_pass
from latentdiff.metrics.psnr import psnr
from latentdiff.models.control import ControlNetwork
from latentdiff.models.controlnet import ControlNet
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.pictures import to_tensor
from latentdiff.pipeline.output import PipelineOutput
from latentdiff.solvers import Solver
from latentdiff.solvers.embedded_pairs import dpm_adaptive, rk45, sde_adaptive
from latentdiff.solvers.langevin import AnnealedLangevin, RecoveryLangevin

STEPS = 3


@cache
def pipe(*, fast: bool = False) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(device="cpu", dtype="float32", fast=fast)


def scribble(width: int = 60, height: int = 54) -> Image.Image:
    """A red disc on white; its sides are no multiples of 16."""
    image = Image.new("RGB", (width, height), "white")
    box = (width // 5, height // 5, width - width // 5, height - height // 5)
    ImageDraw.Draw(image).ellipse(box, fill=(220, 30, 40))
    return image


def hole(width: int = 60, height: int = 54) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).ellipse((18, 14, 44, 40), fill=255)
    return mask


def combinations() -> dict[str, tuple[list[Edit], int]]:
    """The edits, and how many moves the run then has: with jumps of 1, gone through twice."""
    late = SDEdit(scribble(), 0.7)  # 2 steps of 3
    painted = RePaint(scribble(), hole(), jump_length=1, resamples=2)
    coarse = ILVR(scribble(), factor=2)
    return {
        "SDEdit": ([late], 2),
        "RePaint": ([painted], 7),
        "ILVR": ([coarse], 3),
        "SDEdit+RePaint": ([late, painted], 4),
        "RePaint+ILVR": ([painted, coarse], 7),
        "all": ([late, painted, coarse], 4),
    }


def quick(name: str) -> str | Solver:
    """A solver by its name; what would call the network hundreds of times, coarser."""
    process = pipe().bundle.process
    return {
        "annealed-langevin": AnnealedLangevin(repeats=3),
        "recovery-langevin": RecoveryLangevin(repeats=3),
        "rk45": rk45(process, 0.5, 0.5),
        "dpm-adaptive": dpm_adaptive(process, 0.5, 0.5),
        "sde-adaptive": sde_adaptive(process, 0.5, 0.5),
    }.get(name, name)


SCALES = (1.0, 4.0)
CELLS = list(product(combinations(), SCALES))


def matrix() -> list[ParameterSet]:
    cells: list[ParameterSet] = []
    for row, solver in enumerate(solvers.names()):
        for column, (name, scale) in enumerate(CELLS):
            marks = [] if column == row % len(CELLS) else [pytest.mark.slow]
            cells.append(
                pytest.param(name, solver, scale, marks=marks, id=f"{name}-{solver}-{scale:g}")
            )
    return cells


@pytest.mark.parametrize(("name", "solver", "scale"), matrix())
def test_every_edit_with_every_solver_and_guidance(name: str, solver: str, scale: float) -> None:
    """Finite; known pixels bit for bit; the reference's low frequencies; the steps asked for."""
    edits, moves = combinations()[name]
    levels: list[NoiseLevel] = []
    output = pipe()(
        "a red heart",
        edits=edits,
        num_inference_steps=STEPS,
        solver=quick(solver),
        guidance_scale=scale,
        seed=1,
        output_type="pt",
        on_move=lambda _, level, __: levels.append(level),
        progress=False,
    )
    assert len(levels) == moves
    assert_kept(name, output)


@pytest.mark.parametrize("name", combinations())
def test_every_edit_in_four_calls_of_the_fast_model(name: str) -> None:
    edits, draw = combinations()[name][0], pipe(fast=True)
    output = draw("a red heart", edits=edits, seed=1, output_type="pt", progress=False)
    assert_kept(name, output)


def assert_kept(name: str, output: PipelineOutput) -> None:
    """Pass if all is finite, known pixels the given ones and low frequencies the reference's."""
    assert bool(torch.isfinite(output.images).all())
    assert bool(torch.isfinite(output.latents).all())
    given = to_tensor(scribble())
    if "RePaint" in name or name == "all":
        known = torch.from_numpy(np.asarray(hole()) == 0)
        assert torch.equal(output.images[0][:, known], (given / 2 + 0.5)[:, known])
    if "ILVR" in name or name == "all":
        padded = torch.nn.functional.pad(given[None], (0, 4, 0, 10), mode="replicate")
        reference = pipe().bundle.autoencoder.encode(padded)
        gap = low_pass(output.latents, 2) - low_pass(reference, 2)
        assert gap.square().mean().sqrt() < 3e-4


@pytest.mark.parametrize(
    ("side", "refinements"), [(64, 1), pytest.param(128, 3, marks=pytest.mark.slow)]
)
def test_invert_and_return(side: int, refinements: int) -> None:
    """At least 35 dB against the autoencoder's own reconstruction, 50 steps of second order."""
    picture = scribble(side, side)
    noise = pipe().invert(picture, "a red circle", refinements=refinements)
    assert 0.5 < noise.std() < 2.5
    back = pipe()(
        "a red circle",
        latents=noise,
        height=side,
        width=side,
        num_inference_steps=50,
        guidance_scale=1,
        solver="heun",
        timetable="karras",
        output_type="pt",
        progress=False,
    )
    bundle = pipe().bundle
    with torch.no_grad():
        known = bundle.autoencoder.decode(
            bundle.autoencoder.encode(to_tensor(picture)[None])
        ).clamp(-1, 1)
    assert psnr(back.images * 2 - 1, known).item() >= 35


@cache
def random_control() -> ControlNetwork:
    """A ControlNet beside the bundled model, of its own weights, that says something."""
    unet = pipe().bundle.network.module
    assert isinstance(unet, CrossAttentionUNet)
    made = ControlNet.beside(unet, [8] * 5, 32, attention=False)
    random = torch.Generator().manual_seed(0)
    for layer in (*made.controlnet_down_blocks, made.controlnet_cond_embedding.conv_out):
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        torch.nn.init.normal_(weight, std=0.1, generator=random)
    return ControlNetwork(made.eval().requires_grad_(False))


CONTROLLED = ("none", "SDEdit", "RePaint", "ILVR")


@pytest.mark.parametrize("solver", ["ddim", "euler-a", "heun", "dpmpp-2m", "unipc", "ddpm"])
@pytest.mark.parametrize(
    "edit", [pytest.param(e, marks=[] if e == "ILVR" else pytest.mark.slow) for e in CONTROLLED]
)
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_controls_with_every_edit(edit: str, solver: str, count: int) -> None:
    """Seen, and what the edit keeps is kept."""
    edits, _ = ([], 3) if edit == "none" else combinations()[edit]
    kinds = ("canny", "palette")[:count]
    controls = [Control(random_control(), scribble(), kind=kind) for kind in kinds]
    call: dict[str, Any] = {"edits": edits, "num_inference_steps": STEPS, "solver": solver}
    call |= {"seed": 1, "output_type": "pt", "progress": False}
    output = pipe()("a red heart", controls=controls, **call)
    assert bool(torch.isfinite(output.images).all())
    size: dict[str, Any] = {} if edits else {"height": 64, "width": 64}
    without = pipe()("a red heart", **call, **size).images[..., :54, :60]
    assert output.images.shape == without.shape
    assert (output.images - without).abs().max() > 0.01
    given = to_tensor(scribble())
    if edit == "RePaint":
        known = torch.from_numpy(np.asarray(hole()) == 0)
        assert torch.equal(output.images[0][:, known], (given / 2 + 0.5)[:, known])
    if edit == "ILVR":
        padded = torch.nn.functional.pad(given[None], (0, 4, 0, 10), mode="replicate")
        reference = pipe().bundle.autoencoder.encode(padded)
        gap = low_pass(output.latents, 2) - low_pass(reference, 2)
        assert gap.square().mean().sqrt() < 3e-4

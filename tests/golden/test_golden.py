"""Golden pictures of the bundled model, drawn here and by diffusers."""

from typing import Any

import pytest
import torch
from golden.make_golden import GOLDEN, PROMPTS, draw

from latentdiff import LatentDiffusionPipeline
from latentdiff.formats.location import find
from latentdiff.metrics.psnr import psnr
from latentdiff.pictures import open_picture, to_tensor


def test_the_bundled_model_draws_its_golden_picture() -> None:
    golden = to_tensor(open_picture(GOLDEN))
    drawn = torch.cat(list(draw()), dim=-1) * 2 - 1
    assert golden.shape == drawn.shape
    assert psnr(drawn[None], golden[None]).item() >= 35.0


def test_most_bundled_red_hearts_are_red_in_the_middle_and_white_in_the_corners() -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(device="cpu")
    pictures = pipe(["a red heart"] * 4, seed=1, output_type="pt", progress=False).images
    middle = pictures[:, :, 48:80, 48:80].mean((2, 3))
    red = middle[:, 0] - middle[:, 1:].amax(1) > 0.4
    white = pictures[:, :, (0, 0, -1, -1), (0, -1, 0, -1)].amin((1, 2)) > 0.9
    assert (red & white).sum() >= 3


def test_the_bundled_model_draws_the_same_in_diffusers() -> None:
    """At the settings of both: its folder names the solver and the timetable. The two plain lines
    of the model's card; no dtype is named."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )

    theirs: Any = StableDiffusionPipeline.from_pretrained(find(None))
    theirs.set_progress_bar_config(disable=True)
    ours = LatentDiffusionPipeline.from_pretrained(device="cpu", dtype="float32")
    shape = (1, ours.bundle.latent_channels, 8, 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    settings: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0}
    picture = theirs(PROMPTS[0], latents=latents, output_type="np", **settings).images
    made = ours(PROMPTS[0], latents=latents, output_type="np", progress=False, **settings)
    assert made.images == pytest.approx(picture, abs=2e-3)

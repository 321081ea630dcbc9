"""Pixels equal to diffusers' inpainting and InstructPix2Pix pipelines on shared tiny weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import (
    StableDiffusionInpaintPipeline,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import (
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from tiny import tiny_bundle, tower_of, unet_of, vae_of
from torch import Tensor

from latentdiff import Inpaint, Instruct, LatentDiffusionPipeline
from latentdiff.bundle import Bundle, Steps
from latentdiff.models.network import Kind

TOLERANCE = 1e-4  # of pixels in [0, 1]; the largest seen is 2.4e-6
STEPS = 8
PROMPTS = ["a red heart", "a red cat"]
NEGATIVES = ["a blue square", "a sad dog"]
THEIRS: dict[Kind, Any] = {
    "inpainting": StableDiffusionInpaintPipeline,
    "instruct-pix2pix": StableDiffusionInstructPix2PixPipeline,
}


def tiny(kind: Kind) -> Bundle:
    """A tiny model, whose posterior is as good as its mean: diffusers samples masked pictures."""
    bundle = tiny_bundle(
        prediction="eps", steps=Steps("leading"), in_channels={"inpainting": 9}.get(kind, 8)
    )
    last: Any = vae_of(bundle).quant_conv
    last.weight[4:].zero_()
    last.bias[4:].fill_(-30.0)  # ln variance, so a deviation of 3e-7
    return replace(bundle, solver="ddim")


def diffusers_folder(kind: Kind, folder: Path) -> Path:
    """The same parts as diffusers itself writes them."""
    bundle = tiny(kind)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    THEIRS[kind](
        vae=vae_of(bundle),
        text_encoder=tower_of(bundle).model,
        tokenizer=tower_of(bundle).tokenizer,
        unet=unet_of(bundle),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def picture() -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask() -> Image.Image:
    """Greys about one half, and holes that begin within a latent."""
    pixels = np.random.default_rng(4).integers(0, 256, (16, 16), dtype=np.uint8)
    pixels[3:12, 5:] = 255
    return Image.fromarray(pixels)


def noise() -> Tensor:
    return torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(5))


def draw_theirs(pipe: Any, kind: Kind, scale: float, image_scale: float) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"image": picture(), "mask_image": mask()}
    if kind == "instruct-pix2pix":
        # Two pictures for two prompts; one alone is repeated with a warning.
        given = {"image": [picture(), picture()], "image_guidance_scale": image_scale}
    return pipe(
        PROMPTS,
        negative_prompt=NEGATIVES,
        latents=noise(),
        guidance_scale=scale,
        num_inference_steps=STEPS,
        output_type="np",
        **given,
    ).images


def draw_ours(bundle: Bundle, scale: float, image_scale: float) -> np.ndarray:
    """The decoded latents [B, H, W, 3]: `Inpaint` then pastes what is known over them."""
    painted = bundle.kind == "inpainting"
    edit = Inpaint(picture(), mask()) if painted else Instruct(picture(), image_scale)
    latents = LatentDiffusionPipeline(bundle)(
        PROMPTS,
        negative_prompt=NEGATIVES,
        edits=[edit],
        latents=noise(),
        guidance_scale=scale,
        num_inference_steps=STEPS,
        solver="ddim",
        output_type="latent",
        progress=False,
    ).latents
    return (bundle.autoencoder.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


RUNS: list[tuple[Kind, float, float]] = [
    ("inpainting", 1.0, 1.0),
    ("inpainting", 5.0, 1.0),
    ("instruct-pix2pix", 1.0, 1.0),
    ("instruct-pix2pix", 7.5, 1.0),
    ("instruct-pix2pix", 7.5, 1.5),
]


@torch.no_grad()
@pytest.mark.parametrize("saved", ["there", "here"])
@pytest.mark.parametrize(("kind", "scale", "image_scale"), RUNS)
def test_either_side_draws_the_same(
    kind: Kind, scale: float, image_scale: float, saved: str, tmp_path: Path
) -> None:
    """A folder written on one side and opened on both."""
    if saved == "there":
        folder = diffusers_folder(kind, tmp_path / "model")
    else:
        folder = tiny(kind).save(tmp_path / "model")
    bundle = Bundle.load(folder)
    assert bundle.kind == kind
    ours = draw_ours(bundle, scale, image_scale)
    assert ours.std() > 0.05  # a picture, not a plain
    assert np.abs(ours[0] - ours[1]).max() > 0.05
    opened: Any = DiffusionPipeline.from_pretrained(folder)  # of the class that the index names
    assert type(opened) is THEIRS[kind]
    theirs = draw_theirs(opened, kind, scale, image_scale)
    assert np.abs(ours - theirs).max() <= TOLERANCE

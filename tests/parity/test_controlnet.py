"""Pixels equal to diffusers' ControlNet pipelines on shared tiny weights and noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image
from tiny import tiny_bundle, tiny_control, tower_of, unet_of, vae_of, with_own_networks
from torch import Tensor

from latentdiff import Control, LatentDiffusionPipeline
from latentdiff.bundle import Bundle, Steps

TOLERANCE = 1e-4  # of pixels in [0, 1]
STEPS = 8
PROMPTS = ["a red heart", "the flag of a small island"]
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
SCHEDULERS: dict[str, Any] = {
    "ddim": lambda: DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, clip_sample=False),
    "euler": lambda: EulerDiscreteScheduler(**SCHEDULE),
    "dpmpp-2m": lambda: DPMSolverMultistepScheduler(**SCHEDULE),
}


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def noise() -> Tensor:
    return torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two ControlNets as diffusers saves them."""
    place = tmp_path_factory.mktemp("controls")
    for number in (0, 1):
        tiny_control(seed=10 + number).save_pretrained(place / str(number))
    return [place / "0", place / "1"]


def theirs(bundle: Bundle, solver: str, folders: list[Path], kind: Any = None, **call: Any) -> Any:
    kind = kind or StableDiffusionControlNetPipeline
    controls: Any = [ControlNetModel.from_pretrained(folder) for folder in folders]
    pipe = kind(
        vae=vae_of(bundle),
        text_encoder=tower_of(bundle).model,
        tokenizer=tower_of(bundle).tokenizer,
        unet=unet_of(bundle),
        controlnet=controls if len(controls) > 1 else controls[0],
        scheduler=SCHEDULERS[solver](),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": STEPS, "output_type": "np", "guidance_scale": 5.0}
    return pipe(PROMPTS, **given | call).images


def ours(bundle: Bundle, solver: str, controls: list[Control], **call: Any) -> np.ndarray:
    given: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np"}
    given |= {"guidance_scale": 5.0, "progress": False}
    pipe = LatentDiffusionPipeline(bundle)
    pipe.scheduler = SCHEDULERS[solver]()
    return pipe(PROMPTS, controls=controls, **given | call).images


def same(one: np.ndarray, other: np.ndarray) -> None:
    assert one.std() > 0.05  # a picture, not a plain
    assert np.abs(one[0] - one[1]).max() > 0.05
    assert np.abs(one - other).max() <= TOLERANCE


BUNDLE = tiny_bundle(prediction="eps", steps=Steps("leading", 1, False))
CALLS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "weak, for a part of the run, without guidance": (
        1,
        {"scale": 0.6, "start": 0.2, "end": 0.8},
        {"guidance_scale": 1.0},
    ),
    "two": (2, {"scale": 0.7, "end": 0.6}, {}),
    "guess": (1, {"guess": True}, {}),
    "two, guess": (2, {"guess": True, "scale": 0.8}, {}),
}


@torch.no_grad()
@pytest.mark.parametrize("solver", SCHEDULERS)
@pytest.mark.parametrize("call", CALLS)
def test_pixels_are_those_of_diffusers(call: str, solver: str, folders: list[Path]) -> None:
    """Its U-Net and ours; a picture for each prompt, or one for both."""
    count, settings, run = CALLS[call]
    pictures = [[picture(1), picture(2)], picture(3)][:count]
    controls = [
        Control(folder, image, **settings) for folder, image in zip(folders, pictures, strict=False)
    ]
    named = {"scale": "controlnet_conditioning_scale", "guess": "guess_mode"}
    named |= {"start": "control_guidance_start", "end": "control_guidance_end"}
    told: dict[str, Any] = {named[key]: value for key, value in settings.items()}
    if count > 1:
        told |= {key: [value] * 2 for key, value in told.items() if key != "guess_mode"}
        pictures = [[picture(1), picture(3)], [picture(2), picture(3)]]
    else:
        pictures = pictures[0]
    wanted = theirs(BUNDLE, solver, folders[:count], image=pictures, latents=noise(), **run | told)
    same(ours(BUNDLE, solver, controls, latents=noise(), **run), wanted)
    own = with_own_networks(BUNDLE)
    same(ours(own, solver, controls, latents=noise(), **run), wanted)
    without = ours(BUNDLE, solver, [], latents=noise(), **run)
    assert np.abs(without - wanted).max() > 0.05  # the control was seen

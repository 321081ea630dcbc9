"""Pixels equal to diffusers' pipelines with IP-Adapters, on shared tiny weights and noise."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image
from tiny import (
    tiny_bundle,
    tiny_control,
    tiny_ip_adapter,
    tiny_xl,
    tower_of,
    unet_of,
    vae_of,
    with_own_networks,
)
from torch import Tensor

from latentdiff import Control, ImagePrompt, LatentDiffusionPipeline
from latentdiff.bundle import Bundle, Steps

TOLERANCE = 1e-4  # of pixels in [0, 1]
STEPS = 4
PROMPTS = ["a red heart", "a slice of pizza"]
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
# Kinds of the adapters, how many pictures each is shown, and its scale.
CASES: dict[str, list[tuple[Any, int, float]]] = {
    "pooled": [("pooled", 1, 1.0)],
    "plus, weak": [("plus", 1, 0.6)],
    "full": [("full", 1, 1.0)],
    "of two pictures": [("pooled", 2, 0.8)],
    "two": [("plus", 2, 0.7), ("pooled", 1, -0.5)],
}


def picture(seed: int, size: tuple[int, int] = (23, 17)) -> Image.Image:
    """Of a size that must be resized, and cropped."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def noise(count: int) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def shown(case: str) -> list[list[Image.Image]]:
    return [
        [picture(10 * place + number) for number in range(count)]
        for place, (_, count, _) in enumerate(CASES[case])
    ]


def files(case: str, bundle: Bundle, place: Path) -> list[Path]:
    """One folder, whose one image encoder diffusers gives to every adapter."""
    made: list[Path] = []
    for number, (kind, _, _) in enumerate(CASES[case]):
        file = tiny_ip_adapter(place, bundle.network, kind)
        made.append(file.rename(place / f"{number}.safetensors"))
    return made


def theirs(pipe: Any, case: str, adapters: list[Path], solver: str, **call: Any) -> np.ndarray:
    if not hasattr(pipe.unet.encoder_hid_proj, "num_ip_adapters"):
        names = [file.name for file in adapters]
        pipe.load_ip_adapter(str(adapters[0].parent), subfolder="", weight_name=names)
        pipe.set_ip_adapter_scale([scale for _, _, scale in CASES[case]])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[solver]()
    given = {"num_inference_steps": STEPS, "output_type": "np"}
    return pipe(ip_adapter_image=shown(case), **given | call).images


def ours(bundle: Bundle, solver: str, given: list[ImagePrompt], **call: Any) -> np.ndarray:
    pipe = LatentDiffusionPipeline(bundle)
    pipe.scheduler = SCHEDULERS[solver]()
    told: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np", "progress": False}
    return pipe(image_prompts=given, **told | call).images


def prompts(case: str, adapters: list[Any], **changed: Any) -> list[ImagePrompt]:
    return [
        ImagePrompt(one, **{"image": pictures, "scale": scale} | changed)
        for one, pictures, (_, _, scale) in zip(adapters, shown(case), CASES[case], strict=True)
    ]


def check(
    case: str,
    bundle: Bundle,
    pipe: Any,
    place: Path,
    ours_too: dict[str, Any] | None = None,
    theirs_too: dict[str, Any] | None = None,
    **call: Any,
) -> None:
    """Ours are theirs with every solver; and pictures, and scales, are seen."""
    adapters = files(case, bundle, place)
    given = prompts(case, adapters)
    loaded = [one.loaded for one in given]
    for solver in SCHEDULERS:
        wanted = theirs(pipe, case, adapters, solver, **call | (theirs_too or {}))
        got = ours(bundle, solver, given, **call | (ours_too or {}))
        assert got.std() > 0.05  # a picture, not a plain
        assert np.abs(got - wanted).max() <= TOLERANCE, solver
        for changed in ({"image": picture(99)}, {"scale": 0.3}, {"scale": 0}):
            if solver == "ddim":
                told = prompts(case, loaded, **changed)
                other = ours(bundle, solver, told, **call | (ours_too or {}))
                assert np.abs(other - wanted).max() > 0.01, changed


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return with_own_networks(tiny_bundle(prediction="eps", steps=Steps("leading", 1, False)))


def parts(bundle: Bundle) -> dict[str, Any]:
    """What a pipeline of diffusers is made of; an adapter changes its U-Net."""
    return {
        "vae": vae_of(bundle),
        "text_encoder": tower_of(bundle).model,
        "tokenizer": tower_of(bundle).tokenizer,
        "unet": copy.deepcopy(unet_of(bundle)),
        "scheduler": SCHEDULERS["ddim"](),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_diffusers(case: str, bundle: Bundle, tmp_path: Path) -> None:
    """Of two prompts, with guidance; the one of two pictures without."""
    pipe = StableDiffusionPipeline(**parts(tiny_bundle(prediction="eps")))
    scale = 1.0 if case == "of two pictures" else 5.0
    check(case, bundle, pipe, tmp_path, prompt=PROMPTS, guidance_scale=scale, latents=noise(2))


@torch.no_grad()
def test_beside_a_control_network(bundle: Bundle, tmp_path: Path) -> None:
    """Which is not told the picture."""
    tiny_control().save_pretrained(tmp_path / "control")
    control: Any = ControlNetModel.from_pretrained(tmp_path / "control")
    pipe = StableDiffusionControlNetPipeline(
        controlnet=control, **parts(tiny_bundle(prediction="eps"))
    )
    edges = picture(3, (16, 16))
    check(
        "plus, weak",
        bundle,
        pipe,
        tmp_path,
        {"controls": [Control(tmp_path / "control", edges)]},
        {"image": edges},
        prompt=PROMPTS[0],
        guidance_scale=5.0,
        latents=noise(1),
    )


@torch.no_grad()
@pytest.mark.parametrize("case", ["pooled", "plus, weak", "two"])
def test_pixels_of_stable_diffusion_xl_too(case: str, tmp_path: Path) -> None:
    folder = tiny_xl().save(tmp_path / "model")
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    call: dict[str, Any] = {"prompt": PROMPTS[0], "guidance_scale": 4.0, "latents": noise(1)}
    check(case, Bundle.load(folder), pipe, tmp_path, **call)

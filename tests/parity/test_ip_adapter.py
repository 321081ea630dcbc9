"""Pixels equal to diffusers' pipelines with IP-Adapters, on shared tiny weights and noise."""

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
from diffusers_runs import SCHEDULERS, noise, ours, parts, picture, same, stable_diffusion, theirs
from PIL import Image
from tiny import tiny_control, tiny_ip_adapter, tiny_xl, with_own_networks

from latentdiff import Control, ImagePrompt
from latentdiff.bundle import Bundle

STEPS = 4
PROMPTS = ["a red heart", "a slice of pizza"]
# Kinds of the adapters, how many pictures each is shown, and its scale.
CASES: dict[str, list[tuple[Any, int, float]]] = {
    "pooled": [("pooled", 1, 1.0)],
    "plus, weak": [("plus", 1, 0.6)],
    "full": [("full", 1, 1.0)],
    "of two pictures": [("pooled", 2, 0.8)],
    "two": [("plus", 2, 0.7), ("pooled", 1, -0.5)],
}


SIZE = (23, 17)  # of pictures that must be resized, and cropped


def shown(case: str) -> list[list[Image.Image]]:
    return [
        [picture(10 * place + number, SIZE) for number in range(count)]
        for place, (_, count, _) in enumerate(CASES[case])
    ]


def files(case: str, bundle: Bundle, place: Path) -> list[Path]:
    """One folder, whose one image encoder diffusers gives to every adapter."""
    made: list[Path] = []
    for number, (kind, _, _) in enumerate(CASES[case]):
        file = tiny_ip_adapter(place, bundle.network, kind)
        made.append(file.rename(place / f"{number}.safetensors"))
    return made


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
    pipe.load_ip_adapter(str(place), subfolder="", weight_name=[file.name for file in adapters])
    pipe.set_ip_adapter_scale([scale for _, _, scale in CASES[case]])
    call |= {"num_inference_steps": STEPS}
    for solver in SCHEDULERS:
        told = call | {"ip_adapter_image": shown(case)} | (theirs_too or {})
        wanted = theirs(pipe, solver, **told)
        own = call | (ours_too or {})
        same(ours(bundle, solver, image_prompts=given, **own), wanted)
        for changed in ({"image": picture(99, SIZE)}, {"scale": 0.3}, {"scale": 0}):
            if solver == "ddim":
                others = prompts(case, loaded, **changed)
                other = ours(bundle, solver, image_prompts=others, **own)
                assert np.abs(other - wanted).max() > 0.01, changed


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return with_own_networks(stable_diffusion())


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_diffusers(case: str, bundle: Bundle, tmp_path: Path) -> None:
    """Of two prompts, with guidance; the one of two pictures without."""
    pipe = StableDiffusionPipeline(**parts(stable_diffusion()))
    scale = 1.0 if case == "of two pictures" else 5.0
    latents = noise(2, 4, 8, 8)
    check(case, bundle, pipe, tmp_path, prompt=PROMPTS, guidance_scale=scale, latents=latents)


@torch.no_grad()
def test_beside_a_control_network(bundle: Bundle, tmp_path: Path) -> None:
    """Which is not told the picture."""
    tiny_control().save_pretrained(tmp_path / "control")
    control: Any = ControlNetModel.from_pretrained(tmp_path / "control")
    pipe = StableDiffusionControlNetPipeline(controlnet=control, **parts(stable_diffusion()))
    edges = picture(3)
    check(
        "plus, weak",
        bundle,
        pipe,
        tmp_path,
        {"controls": [Control(tmp_path / "control", edges)]},
        {"image": edges},
        prompt=PROMPTS[0],
        guidance_scale=5.0,
        latents=noise(1, 4, 8, 8),
    )


@torch.no_grad()
@pytest.mark.parametrize("case", ["pooled", "plus, weak", "two"])
def test_pixels_of_stable_diffusion_xl_too(case: str, tmp_path: Path) -> None:
    folder = tiny_xl().save(tmp_path / "model")
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    call: dict[str, Any] = {
        "prompt": PROMPTS[0],
        "guidance_scale": 4.0,
        "latents": noise(1, 4, 8, 8),
    }
    check(case, Bundle.load(folder), pipe, tmp_path, **call)

"""Pixels equal to diffusers' ControlNet pipelines on shared tiny weights and noise."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from diffusers.pipelines.controlnet.pipeline_controlnet_img2img import (
    StableDiffusionControlNetImg2ImgPipeline,
)
from diffusers.pipelines.controlnet.pipeline_controlnet_sd_xl import (
    StableDiffusionXLControlNetPipeline,
)
from diffusers_runs import SCHEDULERS, noise, ours, parts, picture, same, stable_diffusion, theirs
from tiny import draw_weights, tiny_control, tiny_xl, unet_of, vae_of, with_own_networks
from torch import Tensor

from latentdiff import Control, SDEdit
from latentdiff.bundle import Bundle
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing import Finish, RunContext
from latentdiff.models.cross_attention_unet import CrossAttentionUNet

STEPS = 8
PROMPTS = ["a red heart", "the flag of a small island"]


RUN: dict[str, Any] = {"prompt": PROMPTS, "num_inference_steps": STEPS, "guidance_scale": 5.0}
LATENTS = noise(len(PROMPTS), 4, 8, 8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two ControlNets as diffusers saves them."""
    place = tmp_path_factory.mktemp("controls")
    for number in (0, 1):
        tiny_control(seed=10 + number).save_pretrained(place / str(number))
    return [place / "0", place / "1"]


def loaded(folders: list[Path]) -> Any:
    """As a pipeline of diffusers is given them."""
    controls = [ControlNetModel.from_pretrained(folder) for folder in folders]
    return controls if len(controls) > 1 else controls[0]


BUNDLE = stable_diffusion()
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
    """Its U-Net or ours; a picture for each prompt, or one for both."""
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
    run = RUN | {"latents": LATENTS} | run
    pipe = StableDiffusionControlNetPipeline(controlnet=loaded(folders[:count]), **parts(BUNDLE))
    wanted = theirs(pipe, solver, image=pictures, **run | told)
    own = with_own_networks(BUNDLE) if solver == "ddim" else BUNDLE
    same(ours(own, solver, controls=controls, **run), wanted)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.05
    without = ours(BUNDLE, solver, **run)
    assert np.abs(without - wanted).max() > 0.05  # the control was seen


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A model of the Stable Diffusion XL family, and two ControlNets for it."""
    place = tmp_path_factory.mktemp("xl")
    bundle = tiny_xl()
    for number in (0, 1):
        control: Any = ControlNetModel.from_unet(
            unet_of(bundle), conditioning_embedding_out_channels=(8, 8)
        )
        draw_weights(control, 20 + number).save_pretrained(place / str(number))
    return bundle.save(place / "model"), [place / "0", place / "1"]


@torch.no_grad()
@pytest.mark.parametrize("solver", SCHEDULERS)
@pytest.mark.parametrize("call", ["one", "two", "guess"])
def test_pixels_of_stable_diffusion_xl_too(
    call: str, solver: str, xl: tuple[Path, list[Path]]
) -> None:
    model, folders = xl
    count, settings, _ = CALLS[call]
    controls = loaded(folders[:count])
    pipe = StableDiffusionXLControlNetPipeline.from_pretrained(model, controlnet=controls)
    told: dict[str, Any] = {"guess_mode": settings.get("guess", False)}
    scale, end = settings.get("scale", 1.0), settings.get("end", 1.0)
    told |= {"controlnet_conditioning_scale": [scale] * count if count > 1 else scale}
    told |= {"control_guidance_end": [end] * count if count > 1 else end}
    pictures = [picture(1), picture(2)][:count]
    run = RUN | {"prompt": PROMPTS[0], "guidance_scale": 4.0, "latents": LATENTS[:1]}
    wanted = theirs(pipe, solver, image=pictures if count > 1 else pictures[0], **run | told)
    bundle = Bundle.load(model)
    assert isinstance(bundle.network.module, CrossAttentionUNet)
    own = [Control(f, p, **settings) for f, p in zip(folders, pictures, strict=False)]
    same(ours(bundle, solver, controls=own, **run), wanted)
    assert np.abs(ours(bundle, solver, **run) - wanted).max() > 0.01


@dataclass(frozen=True)
class _Started:
    """SDEdit, noised by this noise."""

    inner: SDEdit
    noise: Tensor

    def bind(self, context: RunContext) -> tuple["_Started", Finish]:
        edit, finish = self.inner.bind(context)
        return replace(self, inner=edit), finish

    @property
    def picture_size(self) -> tuple[int, int] | None:
        return self.inner.picture_size

    def timetable(self, timetable: Timetable) -> Timetable:
        return self.inner.timetable(timetable)

    def begin(self, x: Tensor, timetable: Timetable, noise: NoiseStreams) -> Tensor:
        image: Any = self.inner.image
        return timetable[0].alpha * image + timetable[0].sigma * self.noise


@torch.no_grad()
def test_a_run_that_starts_late_counts_its_own_steps(folders: list[Path]) -> None:
    """As diffusers' img2img does: the parts of `start` and `end` are of the steps that are made."""
    bundle = stable_diffusion()
    last: Any = vae_of(bundle).quant_conv  # a posterior as good as its mean, which they sample
    last.weight[4:].zero_()
    last.bias[4:].fill_(-30.0)
    random = torch.Generator().manual_seed(9)
    _, drawn = (torch.randn(1, 4, 8, 8, generator=random) for _ in "12")  # of the posterior; of x
    random.manual_seed(9)
    run = RUN | {"prompt": PROMPTS[0]}
    controls = loaded(folders[:1])
    wanted = theirs(
        StableDiffusionControlNetImg2ImgPipeline(controlnet=controls, **parts(bundle)),
        "ddim",
        image=picture(4),
        control_image=picture(1),
        strength=0.5,
        control_guidance_start=0.5,
        controlnet_conditioning_scale=1.0,
        generator=random,
        **run,
    )
    edit = _Started(SDEdit(picture(4), 0.5), drawn)
    control = Control(folders[0], picture(1), start=0.5)
    got = ours(bundle, "ddim", controls=[control], edits=[edit], **run)
    same(got, wanted)
    other = Control(folders[0], picture(1), start=0.75)
    later = ours(bundle, "ddim", controls=[other], edits=[edit], **run)
    assert np.abs(later - got).max() > 0.01

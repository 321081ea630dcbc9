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
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image
from tiny import (
    draw_weights,
    tiny_bundle,
    tiny_control,
    tiny_xl,
    tower_of,
    unet_of,
    vae_of,
    with_own_networks,
)
from torch import Tensor

from latentdiff import Control, LatentDiffusionPipeline, SDEdit
from latentdiff.bundle import Bundle, Steps
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing import Finish, RunContext
from latentdiff.models.cross_attention_unet import CrossAttentionUNet

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
    return pipe(call.pop("prompts", PROMPTS), **given | call).images


def ours(bundle: Bundle, solver: str, controls: list[Control], **call: Any) -> np.ndarray:
    given: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np"}
    given |= {"guidance_scale": 5.0, "progress": False}
    pipe = LatentDiffusionPipeline(bundle)
    pipe.scheduler = SCHEDULERS[solver]()
    return pipe(call.pop("prompts", PROMPTS), controls=controls, **given | call).images


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
    wanted = theirs(BUNDLE, solver, folders[:count], image=pictures, latents=noise(), **run | told)
    own = with_own_networks(BUNDLE) if solver == "ddim" else BUNDLE
    same(ours(own, solver, controls, latents=noise(), **run), wanted)
    without = ours(BUNDLE, solver, [], latents=noise(), **run)
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
    controls = [ControlNetModel.from_pretrained(folder) for folder in folders[:count]]
    given: Any = controls if count > 1 else controls[0]
    pipe: Any = StableDiffusionXLControlNetPipeline.from_pretrained(model, controlnet=given)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[solver]()
    told: dict[str, Any] = {"guess_mode": settings.get("guess", False)}
    scale, end = settings.get("scale", 1.0), settings.get("end", 1.0)
    told |= {"controlnet_conditioning_scale": [scale] * count if count > 1 else scale}
    told |= {"control_guidance_end": [end] * count if count > 1 else end}
    pictures = [picture(1), picture(2)][:count]
    wanted = pipe(
        PROMPTS[0],
        image=pictures if count > 1 else pictures[0],
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        latents=noise()[:1],
        output_type="np",
        **told,
    ).images
    bundle = Bundle.load(model)
    assert isinstance(bundle.network.module, CrossAttentionUNet)
    own = [Control(f, p, **settings) for f, p in zip(folders, pictures, strict=False)]
    ours_pipe = LatentDiffusionPipeline(bundle)
    ours_pipe.scheduler = SCHEDULERS[solver]()
    run: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 4.0}
    run |= {"latents": noise()[:1], "output_type": "np", "progress": False}
    got = ours_pipe(PROMPTS[0], controls=own, **run).images
    assert got.std() > 0.05
    assert np.abs(got - wanted).max() <= TOLERANCE
    assert np.abs(ours_pipe(PROMPTS[0], **run).images - wanted).max() > 0.01


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
    bundle = tiny_bundle(prediction="eps", steps=Steps("leading", 1, False))
    last: Any = vae_of(bundle).quant_conv  # a posterior as good as its mean, which they sample
    last.weight[4:].zero_()
    last.bias[4:].fill_(-30.0)
    random = torch.Generator().manual_seed(9)
    _, drawn = (torch.randn(1, 4, 8, 8, generator=random) for _ in "12")  # of the posterior; of x
    random.manual_seed(9)
    wanted = theirs(
        bundle,
        "ddim",
        folders[:1],
        StableDiffusionControlNetImg2ImgPipeline,
        prompts=PROMPTS[0],
        image=picture(4),
        control_image=picture(1),
        strength=0.5,
        control_guidance_start=0.5,
        controlnet_conditioning_scale=1.0,
        generator=random,
    )
    edit = _Started(SDEdit(picture(4), 0.5), drawn)
    control = Control(folders[0], picture(1), start=0.5)
    got = ours(bundle, "ddim", [control], prompts=PROMPTS[0], edits=[edit])
    assert got.std() > 0.05
    assert np.abs(got - wanted).max() <= TOLERANCE
    other = Control(folders[0], picture(1), start=0.75)
    assert (
        np.abs(ours(bundle, "ddim", [other], prompts=PROMPTS[0], edits=[edit]) - got).max() > 0.01
    )

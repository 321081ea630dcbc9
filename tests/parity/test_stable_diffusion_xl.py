"""Pixels equal to diffusers' pipelines of Stable Diffusion XL, on the same tiny networks and noise.

`models/test_tiny_sees_everything.py` measures that each input of these networks moves the output.
"""

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint import (
    StableDiffusionXLInpaintPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_instruct_pix2pix import (
    StableDiffusionXLInstructPix2PixPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image
from tiny import tiny_bundle, tiny_xl
from torch import Tensor

from latentdiff import (
    DenoisingEnd,
    DenoisingStart,
    Inpaint,
    Instruct,
    LatentDiffusionPipeline,
    SDEdit,
)
from latentdiff.bundle import Bundle, Steps
from latentdiff.cli import main
from latentdiff.diffusion.condition import Condition
from latentdiff.editing import RunContext
from latentdiff.errors import UserError

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4  # of pixels in [0, 1]; the largest seen is 2.1e-6
STEPS = 8  # divides 1000: otherwise diffusers' DDIM steps past the times it visits
PROMPTS = ["a red heart", "the flag of a small island"]
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp-2m": DPMSolverMultistepScheduler,
}
TEXTS: dict[str, dict[str, Any]] = {
    "off": {"guidance_scale": 1.0},
    "no negative": {"guidance_scale": 4.0},  # zero states
    "negative": {"guidance_scale": 4.0, "negative_prompt": ["a blue square", "a sad dog"]},
}


def noise() -> Tensor:
    return torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(5))


def theirs_of(kind: Any, folder: Path, solver: str) -> Any:
    """A pipeline of diffusers out of a folder that was written here."""
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    own = {"set_alpha_to_one": False, "clip_sample": False} if solver == "ddim" else {}
    pipe.scheduler = SCHEDULERS[solver](
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=pipe.scheduler.config["prediction_type"],
        **own,
    )
    return pipe


def ours(bundle: Bundle, **call: Any) -> np.ndarray:
    call = {"num_inference_steps": STEPS, "output_type": "np", "progress": False, **call}
    return LatentDiffusionPipeline(bundle)(**call).images


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.std() > 0.05  # a picture, not a plain
    return float(np.abs(got - wanted).max())


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_both_draw_the_same_whoever_wrote_the_folder(solver: str, tmp_path: Path) -> None:
    prediction = "v" if solver == "ddim" else "eps"
    theirs = theirs_of(
        StableDiffusionXLPipeline, tiny_xl(prediction=prediction).save(tmp_path / "ours"), solver
    )
    theirs.save_pretrained(tmp_path / "theirs")
    bundle = Bundle.load(tmp_path / "theirs")
    assert (bundle.solver, bundle.prediction) == (solver, prediction)
    wanted = {}
    for text, said in TEXTS.items():
        call = {"latents": noise(), "num_inference_steps": STEPS, "output_type": "np", **said}
        wanted[text] = theirs(PROMPTS, **call).images
        assert difference(ours(bundle, prompt=PROMPTS, **call), wanted[text]) <= TOLERANCE
    # No negative prompt is not the empty one, encoded.
    other = replace(bundle.conditioner, zero_empty=False)  # pyright: ignore
    encoded = ours(
        replace(bundle, conditioner=other), prompt=PROMPTS, latents=noise(), **TEXTS["no negative"]
    )
    assert difference(encoded, wanted["no negative"]) > 100 * TOLERANCE


def test_a_folder_keeps_every_bit(tmp_path: Path) -> None:
    """Of a base, and of a refiner, which has no first text encoder; in bfloat16 too."""
    for refiner in (False, True):
        bundle = tiny_xl(refiner=refiner, zero_empty=not refiner)
        folder = bundle.save(tmp_path / f"{refiner}")
        again = Bundle.load(folder)
        assert again.family == "stable-diffusion-xl"
        assert again.conditioner.padding == bundle.conditioner.padding
        again.save(tmp_path / f"{refiner}-again")
        for path in [*sorted(folder.rglob("*.safetensors")), folder / "model_index.json"]:
            copied = tmp_path / f"{refiner}-again" / path.relative_to(folder)
            assert path.read_bytes() == copied.read_bytes(), path
        low = Bundle.load(folder, dtype="bfloat16")
        assert {p.dtype for m in low.modules.values() for p in m.parameters()} == {torch.bfloat16}
        half = Bundle.load(folder, dtype="float16")  # whose autoencoder would overflow
        dtypes = {name: next(m.parameters()).dtype for name, m in half.modules.items()}
        assert dtypes.pop("vae") == torch.float32
        assert set(dtypes.values()) == {torch.float16}


SIZES: dict[str, Any] = {"original_size": (512, 384), "target_size": (640, 768)}


def test_sizes_of_a_call_and_ready_made_states(tmp_path: Path) -> None:
    folder = tiny_xl().save(tmp_path / "model")
    theirs = theirs_of(StableDiffusionXLPipeline, folder, "euler")
    text = TEXTS["negative"] | {"latents": noise()}
    call = text | {"num_inference_steps": STEPS, "output_type": "np"}
    wanted = theirs(PROMPTS, **SIZES, crops_coords_top_left=(64, 32), **call).images
    bundle = Bundle.load(folder)
    got = ours(bundle, prompt=PROMPTS, **SIZES, crop=(64, 32), **text)
    assert difference(got, wanted) <= TOLERANCE
    for left_out in ("original_size", "target_size", "crop"):
        told: dict[str, Any] = SIZES | {"crop": (64, 32)}
        told.pop(left_out)
        assert difference(ours(bundle, prompt=PROMPTS, **told, **text), wanted) > 10 * TOLERANCE

    states, away, pooled, away_pooled = theirs.encode_prompt(
        PROMPTS, negative_prompt=text.pop("negative_prompt")
    )
    ready = {"prompt_embeds": Condition(states=states, pooled=pooled)}
    ready["negative_prompt_embeds"] = Condition(states=away, pooled=away_pooled)
    assert difference(ours(bundle, **ready, **SIZES, crop=(64, 32), **text), wanted) <= TOLERANCE
    whole = torch.tensor([[512.0, 384, 64, 32, 640, 768]] * 2)
    for condition in ready:
        ready[condition] = replace(ready[condition], sizes=whole)
    assert difference(ours(bundle, **ready, **text), wanted) <= TOLERANCE
    for bad, line in (
        ({**ready, "crop": (0, 0)}, "crop: the ready-made condition holds sizes"),
        ({"prompt_embeds": states}, "also told a pooled text"),
        ({"prompt_embeds": Condition(states=states, pooled=pooled[:, 1:])}, "P, 20"),
        ({"prompt": PROMPTS, "original_size": 512}, "original_size: give .height, width."),
        ({"prompt": PROMPTS, "crop": (0, -1)}, "crop: must be a whole number from 0"),
        ({"prompt": PROMPTS, "aesthetic_score": 7}, "aesthetic_score: this model is no refiner"),
    ):
        with pytest.raises(UserError, match=line):
            ours(bundle, **bad)
    with pytest.raises(UserError, match="target_size: this model is told its prompt alone"):
        ours(tiny_bundle(), prompt="a red heart", target_size=(8, 8))


def test_the_command_line_tells_sizes_and_a_picture_remembers_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_xl().save(tmp_path / "model"))
    about = ["--model", model, "--steps", "2", "--out", str(tmp_path)]
    sizes = ["--original-size", "512,384", "--crop", "64,32", "--target-size", "640,768"]
    assert main(["generate", "a red heart", "--seed", "3", *about, *sizes]) == 0
    drawn = Path(capsys.readouterr().out.strip())
    assert main(["generate", "--from", str(drawn), *about]) == 0
    again = Path(capsys.readouterr().out.strip())
    assert pixels_of(drawn) == pixels_of(again)
    assert main(["generate", "a red heart", "--seed", "3", *about, *sizes[2:]]) == 0
    other = Path(capsys.readouterr().out.strip())
    assert pixels_of(drawn) != pixels_of(other)
    assert main(["generate", "a red heart", *about, "--crop", "64"]) == 2
    assert "--crop reads TOP,LEFT" in capsys.readouterr().err


def pixels_of(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_a_base_hands_over_to_a_refiner(solver: str, tmp_path: Path) -> None:
    """diffusers' ensemble of experts: the latents at the level, and the pictures."""
    base = theirs_of(StableDiffusionXLPipeline, tiny_xl().save(tmp_path / "base"), solver)
    bundle = tiny_xl(refiner=True, zero_empty=False, seed=3)
    refiner = theirs_of(StableDiffusionXLImg2ImgPipeline, bundle.save(tmp_path / "refiner"), solver)
    base.save_pretrained(tmp_path / "base2")
    refiner.save_pretrained(tmp_path / "refiner2")
    about = {**TEXTS["negative"], "num_inference_steps": STEPS}
    given = base(PROMPTS, latents=noise(), denoising_end=0.6, output_type="latent", **about).images
    wanted = refiner(PROMPTS, image=given, denoising_start=0.6, output_type="np", **about).images

    mine = Bundle.load(tmp_path / "base2"), Bundle.load(tmp_path / "refiner2")
    pipe = LatentDiffusionPipeline(mine[0])
    call = {**about, "latents": noise(), "output_type": "latent", "progress": False}
    latents = pipe(PROMPTS, edits=[DenoisingEnd(0.6)], **call).latents
    alpha = 1.0
    if solver == "euler":  # whose x is ours over alpha
        levels = DenoisingEnd(0.6).bind(context_of(mine[0]))[0].timetable(mine[0].plan(STEPS)[1])
        alpha = levels[-1].alpha
    assert float((latents / alpha - given).abs().max()) <= 10 * TOLERANCE  # of about unit variance
    got = ours(mine[1], prompt=PROMPTS, edits=[DenoisingStart(latents, 0.6)], **TEXTS["negative"])
    assert difference(got, wanted) <= TOLERANCE

    scores = {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0}
    told = refiner(
        PROMPTS, image=given, denoising_start=0.6, output_type="np", **about, **scores
    ).images
    edits = [DenoisingStart(latents, 0.6)]
    got = ours(mine[1], prompt=PROMPTS, edits=edits, **TEXTS["negative"], **scores)
    assert difference(got, told) <= TOLERANCE
    assert difference(told, wanted) > 10 * TOLERANCE


def context_of(bundle: Bundle) -> RunContext:
    return RunContext(16, 16, bundle.autoencoder, PROMPTS, bundle.process)


def test_handing_over_says_what_does_not_work(tmp_path: Path) -> None:
    bundle = tiny_xl()
    for edits, line in (
        ([DenoisingEnd(0.01)], "of 8 steps 0 begin at or above"),
        ([DenoisingStart(noise(), 0.9999)], "of 8 steps 8 begin at or above"),
        ([DenoisingStart(noise()[:, :3], 0.5)], "an edit holds latents .2, 3, 8, 8."),
    ):
        with pytest.raises(UserError, match=line):
            ours(bundle, prompt=PROMPTS, edits=edits)
    for bad in (0, 1, 1.5, "x"):
        with pytest.raises(UserError, match="at must lie between 0 and 1"):
            DenoisingEnd(bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="a picture goes to SDEdit"):
        DenoisingStart("x.png", 0.5)  # pyright: ignore[reportArgumentType]


def test_the_recipe_is_the_two_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        str(tiny_xl(refiner=refiner, seed=int(refiner)).save(tmp_path / f"{refiner:d}"))
        for refiner in (False, True)
    ]
    recipe = str(ROOT / "pipelines" / "refine.py")
    out = tmp_path / "heart.png"
    line = ["a red heart", "--base", folders[0], "--refiner", folders[1], "--steps", "5"]
    monkeypatch.setattr("sys.argv", [recipe, *line, "--seed", "7", "--out", str(out)])
    runpy.run_path(recipe, run_name="__main__")
    call: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 5.0, "seed": 7}
    call["progress"] = False
    base, refiner = map(LatentDiffusionPipeline.from_pretrained, folders)
    edits: list[Any] = [DenoisingEnd(0.8)]
    latents = base("a red heart", edits=edits, output_type="latent", **call).latents
    edits = [DenoisingStart(latents, 0.8)]
    assert pixels_of(out) == refiner("a red heart", edits=edits, **call).images[0].tobytes()
    other = replace(tiny_xl(refiner=True), steps=Steps("trailing")).save(tmp_path / "other")
    monkeypatch.setattr("sys.argv", [recipe, *line[:4], str(other), *line[5:]])
    with pytest.raises(SystemExit):
        runpy.run_path(recipe, run_name="__main__")
    assert "its noise levels are not those of" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("solver", SCHEDULERS)
@pytest.mark.parametrize("kind", ["inpainting", "instruct-pix2pix"])
def test_models_that_see_a_picture(kind: str, solver: str, tmp_path: Path) -> None:
    """Inpainting of 9 channels, and InstructPix2Pix; the autoencoder has no spread, for diffusers
    samples masked pictures."""
    bundle = tiny_xl(in_channels=9 if kind == "inpainting" else 8)
    last: Any = bundle.autoencoder.module.quant_conv
    last.weight[4:].zero_()
    last.bias[4:].fill_(-30.0)
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    picture, mask = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels[..., 3])
    given: dict[str, Any] = {"image": picture, "mask_image": mask, "strength": 1.0}
    edit: Any = Inpaint(picture, mask)
    theirs_kind: Any = StableDiffusionXLInpaintPipeline
    if kind == "instruct-pix2pix":
        given = {"image": [picture, picture], "image_guidance_scale": 1.5}
        edit, theirs_kind = Instruct(picture, 1.5), StableDiffusionXLInstructPix2PixPipeline
    theirs = theirs_of(theirs_kind, bundle.save(tmp_path / "model"), solver)
    theirs.save_pretrained(tmp_path / "theirs")
    about = {**TEXTS["negative"], "latents": noise()}
    wanted = theirs(
        PROMPTS,
        height=16,
        width=16,
        num_inference_steps=STEPS,
        output_type="np",
        **about,
        **given,
    ).images
    mine = Bundle.load(tmp_path / "theirs")
    assert mine.kind == kind
    call = {"num_inference_steps": STEPS, "output_type": "latent", "progress": False}
    pipe = LatentDiffusionPipeline(mine)
    latents = pipe(PROMPTS, edits=[edit], **about, **call).latents
    drawn = (mine.autoencoder.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert difference(drawn.numpy(), wanted) <= TOLERANCE


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_a_picture_begins_a_run_of_a_refiner(solver: str, tmp_path: Path) -> None:
    """Image to image, of latents, with the noise of the same generators."""
    folder = tiny_xl(refiner=True, zero_empty=False).save(tmp_path / "model")
    theirs = theirs_of(StableDiffusionXLImg2ImgPipeline, folder, solver)
    theirs.save_pretrained(tmp_path / "theirs")
    guide = noise().flip(0) / 2
    wanted = theirs(
        PROMPTS,
        image=guide,
        strength=0.5,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        num_inference_steps=STEPS,
        output_type="np",
        **TEXTS["negative"],
    ).images
    got = ours(
        Bundle.load(tmp_path / "theirs"),
        prompt=PROMPTS,
        edits=[SDEdit(guide, 0.5)],
        seed=[3, 4],
        latents=noise(),  # which are not looked at, and so not drawn
        **TEXTS["negative"],
    )
    assert difference(got, wanted) <= TOLERANCE

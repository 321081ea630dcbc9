"""Pixels equal to diffusers' pipelines of Stable Diffusion XL, on the same tiny networks and noise.

`models/test_tiny_sees_everything.py` measures that each input of these networks moves the output.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image
from tiny import tiny_bundle, tiny_xl
from torch import Tensor

from latentdiff import LatentDiffusionPipeline
from latentdiff.bundle import Bundle
from latentdiff.cli import main
from latentdiff.diffusion.condition import Condition
from latentdiff.errors import UserError

TOLERANCE = 1e-4  # of pixels in [0, 1]
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
    pipe = LatentDiffusionPipeline(bundle)
    return pipe(**call, num_inference_steps=STEPS, output_type="np", progress=False).images


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.std() > 0.05  # a picture, not a plain
    return float(np.abs(got - wanted).max())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_both_draw_the_same_whoever_wrote_the_folder(
    solver: str, text: str, tmp_path: Path
) -> None:
    prediction = "v" if text == "negative" else "eps"
    theirs = theirs_of(
        StableDiffusionXLPipeline, tiny_xl(prediction=prediction).save(tmp_path / "ours"), solver
    )
    theirs.save_pretrained(tmp_path / "theirs")
    bundle = Bundle.load(tmp_path / "theirs")
    assert (bundle.solver, bundle.prediction) == (solver, prediction)
    wanted = theirs(
        PROMPTS, latents=noise(), num_inference_steps=STEPS, output_type="np", **TEXTS[text]
    ).images
    got = ours(bundle, prompt=PROMPTS, latents=noise(), **TEXTS[text])
    assert difference(got, wanted) <= TOLERANCE
    if text == "no negative":  # which is not the empty prompt, encoded
        conditioner = replace(bundle.conditioner, zero_empty=False)  # pyright: ignore
        other = replace(bundle, conditioner=conditioner)
        encoded = ours(other, prompt=PROMPTS, latents=noise(), **TEXTS[text])
        assert difference(encoded, wanted) > 100 * TOLERANCE


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

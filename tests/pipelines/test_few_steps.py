"""`fast`: a model with the LoRA and the schedule that its own folder carries for few steps."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_bundle, with_fast

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.bundle import Steps
from latentdiff.cli import main
from latentdiff.metrics.following import colour_of, count_of

STEPS = Steps("leading", within="leading", teacher_steps=50)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a folder `fast`, whose LoRA changes every layer."""
    return with_fast(tiny_bundle().save(tmp_path_factory.mktemp("model") / "tiny"), STEPS)


def test_fast_is_the_lora_its_solver_and_four_steps_without_guidance(model: Path) -> None:
    fast = LatentDiffusionPipeline.from_pretrained(model, fast=True)
    by_hand = LatentDiffusionPipeline.from_pretrained(model)
    by_hand.load_lora(model / "fast")
    by_hand.bundle = replace(by_hand.bundle, solver="lcm", steps=STEPS)
    drawn = fast("a red heart", seed=3)
    told = {"num_inference_steps": 4, "guidance_scale": 1.0, "seed": 3}
    assert np.array_equal(drawn.images[0], by_hand("a red heart", **told).images[0])
    plain = LatentDiffusionPipeline.from_pretrained(model)
    assert not np.array_equal(drawn.images[0], plain("a red heart", **told).images[0])
    assert not np.array_equal(  # what is said is obeyed
        drawn.images[0], fast("a red heart", seed=3, guidance_scale=3.0).images[0]
    )


def test_its_pictures_remember_it(model: Path, tmp_path: Path) -> None:
    first = ["generate", "a red heart", "--fast", "--model", str(model), "--seed", "3"]
    assert main([*first, "--out", str(tmp_path / "one")]) == 0
    (drawn,) = (tmp_path / "one").glob("*.png")
    record = json.loads(Image.open(drawn).info["latentdiff"])
    assert (record["fast"], record["num_inference_steps"], record["solver"]) == (True, 4, "lcm")
    again = ["generate", "--from", str(drawn), "--model", str(model)]
    assert main([*again, "--out", str(tmp_path / "two")]) == 0
    (redrawn,) = (tmp_path / "two").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(drawn)), np.asarray(Image.open(redrawn)))


def test_a_model_without_it_is_told_so(tmp_path: Path) -> None:
    folder = tiny_bundle().save(tmp_path / "tiny")
    with pytest.raises(UserError, match="has no folder 'fast' with a LoRA of few steps"):
        LatentDiffusionPipeline.from_pretrained(folder, fast=True)


def test_the_bundled_model_draws_in_four_calls_what_it_is_told() -> None:
    fast = LatentDiffusionPipeline.from_pretrained(device="cpu", dtype="float32", fast=True)
    things = {"blue": "car", "red": "heart", "green": "tree", "yellow": "face", "purple": "grapes"}
    prompts = [*(f"a {colour} {thing}" for colour, thing in things.items()), "two red apples"]
    drawn = [np.asarray(picture) for picture in fast(prompts, seed=0, progress=False).images]
    assert [colour_of(picture) for picture in drawn] == [*things, "red"]
    assert count_of(drawn[-1]) == 2

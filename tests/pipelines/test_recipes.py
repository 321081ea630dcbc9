"""The recipes draw what the pipeline draws."""

import runpy
from pathlib import Path
from typing import Literal

import pytest
import torch
from tiny import tiny_bundle

from latentdiff import LatentDiffusionPipeline

RECIPES = Path(__file__).parents[2] / "pipelines"


@pytest.mark.parametrize("tower", ["clip", "t5"])
def test_text_to_image_by_hand_is_the_pipeline(tower: Literal["clip", "t5"]) -> None:
    bundle = tiny_bundle(tower=tower)
    draw = runpy.run_path(str(RECIPES / "text_to_image.py"))["draw"]
    by_hand = draw(bundle, "a red heart", steps=3, guidance_scale=4.0, seed=7)
    pipe = LatentDiffusionPipeline(bundle)
    by_one_call = pipe(
        "a red heart", num_inference_steps=3, seed=7, output_type="pt", progress=False
    ).images
    assert torch.equal((by_hand / 2 + 0.5).clamp(0, 1), by_one_call)

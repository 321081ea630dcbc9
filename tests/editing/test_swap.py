"""Swaps by inversion: from a picture of one thing to the same picture of another."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_bundle

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.cli import main
from latentdiff.pictures import open_picture, to_pil, to_tensor
from latentdiff.pipeline.swapping import swapped


def picture(width: int = 16, height: int = 16) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_swap_for_the_same_gives_the_picture_back_and_for_another_another() -> None:
    """As the autoencoder has it; what is guided away from itself is not guided at all."""
    pipe = LatentDiffusionPipeline(tiny_bundle())
    given = picture()
    autoencoder = pipe.bundle.autoencoder
    with torch.no_grad():
        seen = autoencoder.decode(autoencoder.encode(to_tensor(given)[None]))
    wanted = np.asarray(to_pil(seen[0])).astype(int)
    same = np.asarray(swapped(pipe, given, "a cat", "a cat", strength=0.4)).astype(int)
    other = np.asarray(swapped(pipe, given, "a cat", "a blue square", strength=0.4)).astype(int)
    assert np.abs(same - wanted).mean() < 4
    assert np.abs(other - wanted).mean() > 3 * np.abs(same - wanted).mean()


def test_what_a_mask_leaves_out_stays_to_the_bit() -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    given, mask = picture(18, 15), Image.new("L", (18, 15))
    mask.paste(255, (9, 0, 18, 15))
    drawn = np.asarray(
        swapped(pipe, given, "a cat", "a dog", mask=mask, num_inference_steps=4, strength=1)
    )
    assert drawn.shape == (15, 18, 3)
    assert (drawn[:, :9] == np.asarray(given)[:, :9]).all()
    assert (drawn[:, 9:] != np.asarray(given)[:, 9:]).any(-1).mean() > 0.9


def test_swaps_that_are_none_are_one_line() -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    wrong: list[dict[str, Any]] = [
        {"strength": 0.0},
        {"strength": 0.05},
        {"num_inference_steps": 0},
        {"mask": Image.new("L", (4, 4), 255)},
    ]
    for settings in wrong:
        with pytest.raises(UserError):
            swapped(pipe, picture(), "a cat", "a dog", **settings)


def test_the_command_swaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture().save(tmp_path / "cat.png")
    out = ["-o", str(tmp_path), "--model", str(tiny_bundle().save(tmp_path / "model"))]
    rest = ["--steps", "4", "--strength", "0.5", "--mask", "box:8,0,16,16", "--grid", *out]
    assert main(["swap", str(tmp_path / "cat.png"), "a cat", "a dog", *rest]) == 0
    drawn = np.asarray(open_picture(tmp_path / "00000-0.png"))
    assert (drawn[:, :8] == np.asarray(picture())[:, :8]).all()
    assert open_picture(tmp_path / "00000-0-grid.png").size == (48, 16)
    capsys.readouterr()
    assert main(["show", str(tmp_path / "00000-0.png")]) == 0
    assert "a dog" in capsys.readouterr().out
    assert main(["generate", "--from", str(tmp_path / "00000-0.png"), *out]) == 2
    assert main(["swap", str(tmp_path / "cat.png"), "a cat", " ", *out]) == 2

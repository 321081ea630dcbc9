"""`latentdiff grid`: its cells are the pictures that `generate` draws, in their places."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_bundle

from latentdiff import UserError
from latentdiff.cli import main
from latentdiff.cli.grid import read_axis
from latentdiff.formats.picture_text import OURS, texts_of


def test_each_cell_is_what_generate_draws(tmp_path: Path) -> None:
    model = str(tiny_bundle().save(tmp_path / "model"))
    rest = ["--model", model, "--seed", "3", "-o"]
    axes = ["--x", "steps=1,2,3", "--y", "solver=ddim,heun"]
    assert main(["grid", "a cat", *axes, *rest, str(tmp_path / "grid")]) == 0
    (path,) = (tmp_path / "grid").iterdir()
    sheet = np.asarray(Image.open(path))
    left, top = sheet.shape[1] - 3 * 16, sheet.shape[0] - 2 * 16
    assert (sheet[:top] < 128).any()  # labels
    assert (sheet[top:, :left] < 128).any()
    for row, solver in enumerate(("ddim", "heun")):
        for column in range(3):
            out = tmp_path / f"{solver}{column}"
            steps = ["--steps", str(column + 1), "--solver", solver]
            assert main(["generate", "a cat", *steps, *rest, str(out)]) == 0
            (alone,) = out.iterdir()
            y, x = top + 16 * row, left + 16 * column
            assert (sheet[y : y + 16, x : x + 16] == np.asarray(Image.open(alone))).all()
    assert json.loads(texts_of(path.read_bytes())[OURS])["x"] == "steps=1,2,3"


def test_cells_are_of_one_variation(tmp_path: Path) -> None:
    model = str(tiny_bundle().save(tmp_path / "model"))
    varied = ["--variation-strength", "0.5", "--seed", "3", "--model", model]
    assert main(["grid", "a cat", "--x", "steps=2,2", *varied, "-o", str(tmp_path / "grid")]) == 0
    (path,) = (tmp_path / "grid").iterdir()
    sheet = np.asarray(Image.open(path))
    assert (sheet[-16:, -32:-16] == sheet[-16:, -16:]).all()
    assert "variation_seed" in json.loads(texts_of(path.read_bytes())[OURS])


@pytest.mark.parametrize(
    "text", ["size=1,2", "steps=", "steps=a", "steps=0,2", "steps", "guidance_scale=x", ""]
)
def test_an_axis_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(UserError):
        read_axis(text)
    assert main(["grid", "a", "--x", text]) == 2
    assert main(["grid", "a", "--x", "steps=1", "--y", "steps=2"]) == 2


def test_values_have_the_type_of_their_option() -> None:
    assert read_axis("--guidance-scale=1, 2.5") == ("guidance_scale", [1.0, 2.5])
    assert read_axis("prompt=a cat, big|a dog") == ("prompt", ["a cat, big", "a dog"])

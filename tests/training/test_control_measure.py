"""The measure of a ControlNet: agreement of edges, and the script around it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import script
from shapes import shape_folder
from tiny import tiny_bundle, tiny_control
from typer.testing import CliRunner

from latentdiff.data.folder import held_out
from latentdiff.errors import UserError
from latentdiff.metrics.edges import customary_tolerance, edge_agreement


def line(column: int, rows: slice = slice(0, 20)) -> torch.Tensor:
    found = torch.zeros(20, 20, dtype=torch.bool)
    found[rows, column] = True
    return found


def test_agreement_is_f1_within_a_pixel() -> None:
    """Closed forms: a line moved, halved, doubled, and none."""
    none = torch.zeros(20, 20, dtype=torch.bool)
    assert edge_agreement(line(5), line(5)) == edge_agreement(line(6), line(5), 1) == 1
    assert edge_agreement(line(6), line(5)) == 0  # the customary tolerance is below a pixel here
    assert [customary_tolerance(side, side) for side in (64, 96, 512)] == [0, 1, 5]
    assert edge_agreement(line(7), line(5), 1) == 0
    assert edge_agreement(line(7), line(5), tolerance=2) == 1
    half = line(5, slice(0, 9))  # within a pixel it reaches ten of twenty
    assert edge_agreement(half, line(5), 1) == pytest.approx(2 * 0.5 / 1.5)
    assert edge_agreement(line(5), half, 1) == pytest.approx(2 * 0.5 / 1.5)
    assert edge_agreement(line(5) | line(12), line(5)) == pytest.approx(2 * 0.5 / 1.5)
    assert edge_agreement(none, none) == 1
    assert edge_agreement(none, line(5)) == edge_agreement(line(5), none) == 0


def test_the_script_measures_held_out_pictures(tmp_path: Path) -> None:
    folder, rows = tmp_path / "data", []
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        fields = {"file_name": f"{number}.png", "text": "a cat", "style": "noto", "skin_tone": ""}
        rows.append(json.dumps(fields | {"split": "train" if number < 3 else "test_novel"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    tiny_bundle().save(tmp_path / "model")
    tiny_control().save_pretrained(tmp_path / "net")
    import typer

    module, app = script("measure/evaluate_control"), typer.Typer()
    app.command()(module.main)
    held = held_out(folder, 2, where={"style": ("noto",)})
    assert [example.fields["split"] for example in held] == ["test_novel"] * 2
    words = ["--control", tmp_path / "net", "--model", tmp_path / "model", "--data", folder]
    words += ["--out", tmp_path / "out", "--steps", 2]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out/control.json").read_text())
    assert report["pictures"] == 3
    assert {"decoded", "without", "with", "with, within a pixel"} <= report["f1"].keys()
    assert all(0 <= value <= 1 for value in report["f1"].values())
    assert report["f1"]["without"] != report["f1"]["with"]
    assert (tmp_path / "out/control.png").is_file()
    result = CliRunner().invoke(app, [*map(str, words), "--style", "none"])
    assert result.exit_code == 2
    assert "no picture" in result.output


def test_pictures_are_composed_of_those_held_out_alone(tmp_path: Path) -> None:
    folder = shape_folder(tmp_path / "shapes")
    compose = script("measure/evaluate_control").compose
    with pytest.raises(UserError, match="no picture of the style twemoji is held out"):
        compose(folder, "twemoji", 3, 64)
    rows = (folder / "metadata.jsonl").read_text().replace('"split": "train"', '"split": "test"')
    (folder / "metadata.jsonl").write_text(rows)
    pictures, captions = compose(folder, "noto", 12, 64)
    assert [picture.size for picture in pictures] == [(64, 64)] * 12
    names = {json.loads(row)["name"] for row in rows.splitlines()}
    assert all(any(name in caption for name in names) for caption in captions)
    assert len(set(captions)) > 6

"""`--control NETWORK:PICTURE[:SCALE]` and `--control-from`, on a real tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny import tiny_bundle, tiny_control

from latentdiff import Control, LatentDiffusionPipeline, SDEdit, UserError
from latentdiff.cli import main, output
from latentdiff.cli.controls import parse_control
from latentdiff.editing.control_pictures import edges
from latentdiff.guidance import from_text
from latentdiff.metrics.edges import edge_agreement
from latentdiff.pictures import open_picture, save_png
from latentdiff.pipeline import controls


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    tiny_bundle().save(folder / "model")
    tiny_control().save_pretrained(folder / "net")
    pixels = np.random.default_rng(0).integers(0, 256, (14, 16, 3), dtype=np.uint8)
    save_png(Image.fromarray(pixels), folder / "photo.png")
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


BASE = ["--model", "model", "--seed", "3", "--steps", "3", "--solver", "ddim"]
EDGES = ["--control", "net:photo.png:0.8", "--control-from", "canny"]


def drawn(*arguments: str, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main([*arguments, *BASE]) == 0
    return Path(capsys.readouterr().out.split()[-1])


def wanted(**call: Any) -> np.ndarray:
    pipe = LatentDiffusionPipeline.from_pretrained("model", engine="eager")
    given: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "solver": "ddim"}
    return np.asarray(pipe("a cat", progress=False, **given | call).images[0])


def test_commands_draw_what_calls_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Alone, with another, and with an edit; the picture tells, and is drawn again by its names."""
    path = drawn("generate", "a cat", *EDGES, capsys=capsys)
    control = Control("net", "photo.png", 0.8, kind="canny")
    assert np.array_equal(np.asarray(Image.open(path)), wanted(controls=[control]))
    told = json.loads(Image.open(path).info["latentdiff"])
    assert (told["controls"], told["control_from"]) == (["net:photo.png:0.8"], ["canny"])
    assert main(["generate", "--from", str(path), "--model", "model"]) == 2
    assert "add --control net:photo.png:0.8, with their paths here" in capsys.readouterr().err
    again = ["generate", "--from", str(path), *EDGES[:2], "--model", "model"]
    assert main(again) == 0
    second = Path(capsys.readouterr().out.split()[-1])
    assert np.array_equal(np.asarray(Image.open(second)), np.asarray(Image.open(path)))

    both = ["--control", "net:photo.png", "--control-from", "picture", "--guidance", "apg"]
    edit = ["edit", "photo.png", "a cat", "--strength", "0.7", *EDGES, *both]
    path = drawn(*edit, "--engine", "eager", capsys=capsys)
    other = Control("net", "photo.png")
    edits = [SDEdit("photo.png", 0.7)]
    call = {"controls": [control, other], "edits": edits, "guidance": "apg"}
    assert np.array_equal(np.asarray(Image.open(path)), wanted(**call))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--control-from", "canny"], "--control-from is for --control"),
        (["--control", "net"], "NETWORK:PICTURE or NETWORK:PICTURE:SCALE is meant"),
        (["--control", "net:photo.png:nan"], "NETWORK:PICTURE"),
        (["--control", "none:photo.png"], "none: no such ControlNet"),
        (["--control", "net:none.png"], "none.png: no such picture"),
        (["--control", "model:photo.png"], "model/config.json"),
        ([*EDGES, "--control-from", "grey"], "2 kinds were given for 1 controls"),
        (["--control", "net:photo.png", "--control-from", "cany"], "did you mean 'canny'"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a cat", *BASE, *arguments]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


def test_a_part_of_a_picture_has_no_control(capsys: pytest.CaptureFixture[str]) -> None:
    mask = ["--mask", "box:2,2,8,8", "--only-masked"]
    assert main(["inpaint", "photo.png", "a cat", *mask, *EDGES, *BASE]) == 2
    assert "leave out --only-masked" in capsys.readouterr().err


def test_colons_and_scales() -> None:
    assert parse_control("a/b:c.png") == (Path("a/b"), Path("c.png"), 1.0)
    assert parse_control("a/b:c.png:-0.5") == (Path("a/b"), Path("c.png"), -0.5)
    for text in ("", ":", "a:", ":b", "a:0.5", "a:b:inf"):
        with pytest.raises(UserError, match="is meant"):
            parse_control(text)


def test_a_grid_is_as_large_as_the_model_and_not_as_the_photo(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = Image.open("photo.png").resize((64, 56))
    save_png(large, place / "large.png")
    edges = ["--control", "net:large.png", "--control-from", "canny"]
    alone = drawn("generate", "a cat", *edges, capsys=capsys)
    assert Image.open(alone).size == (16, 14)
    cells = drawn("grid", "a cat", "--x", "steps=2,3", *edges, capsys=capsys)
    assert Image.open(cells).width < 128


@pytest.mark.parametrize(
    "line", [["grid", "--x", "steps=2,3", "--y", "seed=1,2"], ["generate", "-n", "3"]]
)
def test_what_a_command_draws_with_is_read_once(
    line: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ControlNet, shown two pictures, and the model of a guide: for any number of parts."""
    read: list[str] = []

    def counted(holder: Any, name: str) -> None:
        load = getattr(holder, name)

        def one(where: object, **more: Any) -> Any:
            read.append(str(where))
            return load(where, **more)

        monkeypatch.setattr(holder, name, one)

    counted(controls, "load_controlnet")
    counted(from_text.Bundle, "load")
    monkeypatch.setattr(output, "_DRAWN_AT_ONCE_BY_CPU", 16 * 14)
    guide = ["--guide", "autoguidance:1.5:model", "--control", "net:photo.png:0.5"]
    command, *rest = line
    drawn(command, "a cat", *rest, *EDGES, *guide, capsys=capsys)
    assert sorted(read) == ["model", "model", "net"]  # of the models one draws


def test_the_bundled_controlnet_holds_the_bundled_model_to_edges(tmp_path: Path) -> None:
    box = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(box).rectangle((12, 40, 116, 90), fill="royalblue")
    save_png(box, tmp_path / "box.png")
    command = ["generate", "a blue car", "--steps", "8", "--seed", "0"]
    told = ["--control", f"emoji128-edges:{tmp_path / 'box.png'}", "--control-from", "canny"]
    agreements: list[float] = []
    for name, more in {"without": [], "with": told}.items():
        assert main([*command, *more, "--out", str(tmp_path / name)]) == 0
        (made,) = (tmp_path / name).glob("*.png")
        agreements.append(edge_agreement(edges(open_picture(made)), edges(box)))
    assert agreements[1] > agreements[0] + 0.1, agreements

"""`latentdiff edit | inpaint | ilvr | interpolate` on a real tiny model."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_bundle

from latentdiff import Inpaint, Instruct, LatentDiffusionPipeline, SDEdit
from latentdiff.cli import main
from latentdiff.editing import box_mask


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle().save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (15, 13, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "given.png")
    return tmp_path / "given.png"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def record(path: Path) -> dict[str, object]:
    return json.loads(Image.open(path).info["latentdiff"])


def run(model: Path, out: Path, *arguments: str) -> list[Path]:
    """The new pictures of a command of few steps, in their order."""
    before = set(out.glob("*.png"))
    given = [*arguments, "--model", str(model), "--out", str(out)]
    if "--steps" not in arguments:
        given += ["--steps", "4"]
    assert main(given) == 0
    return sorted(set(out.glob("*.png")) - before)


def test_edit(
    model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    grid, *drawn = run(
        model, out, "edit", str(picture), "a cat", "-n", "2", "--seed", "7", "--grid"
    )
    assert [path.name for path in (grid, *drawn)] == [
        "00000-7-grid.png",
        "00000-7.png",
        "00001-7.png",
    ]
    said = capsys.readouterr()
    assert said.err.splitlines() == ["seed 7", "2 of 4 steps"]
    assert sorted(said.out.split()) == sorted(map(str, [grid, *drawn]))
    sheet = np.concatenate([pixels(path) for path in (picture, *drawn)], axis=1)
    assert (pixels(grid) == sheet).all()
    about = record(drawn[1])
    assert (about["edit"], about["strength"], about["picture"]) == ("SDEdit", 0.6, "given.png")
    assert (about["seed"], about["index"], about["prompt"]) == (7, 1, "a cat")

    (same,) = run(model, out, "edit", str(picture), "a cat", "--strength", "0")
    assert (pixels(same) == pixels(picture)).all()
    masked = ["--mask", "box:0,0,5,15", "--strength", "1", "--no-metadata"]
    (part,) = run(model, out, "edit", str(picture), "a cat", *masked)
    assert (pixels(part)[:, 5:] == pixels(picture)[:, 5:]).all()
    assert (pixels(part)[:, :5] != pixels(picture)[:, :5]).any()
    assert not Image.open(part).info


@pytest.mark.parametrize("kind", ["file", "box", "alpha"])
def test_inpaint_paints_the_hole_alone(
    kind: str, model: Path, picture: Path, tmp_path: Path
) -> None:
    hole = np.zeros((15, 13), dtype=np.uint8)
    hole[4:9, 3:11] = 255
    masks = {"file": str(tmp_path / "mask.png"), "box": "box:3,4,11,9", "alpha": "alpha"}
    given = Image.open(picture)
    if kind == "file":
        Image.fromarray(hole).save(masks["file"])
    if kind == "alpha":
        picture = tmp_path / "clear.png"
        given.putalpha(Image.fromarray(255 - hole))
        given.save(picture)
    arguments = ["inpaint", str(picture), "a cat", "--mask", masks[kind], "--resamples", "2"]
    grid, drawn = run(model, tmp_path / "out", *arguments, "--seed", "1", "--grid")
    original = np.asarray(given.convert("RGB"))
    assert (pixels(drawn) == original)[hole == 0].all()
    assert (pixels(drawn) != original)[hole == 255].any()
    assert pixels(grid).shape == (15, 39, 3)
    assert (pixels(grid)[:, 13:26, 0] == hole).all()


@pytest.fixture(scope="module")
def inpainter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(in_channels=9).save(tmp_path_factory.mktemp("inpainter") / "tiny")


@pytest.fixture(scope="module")
def instructed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(in_channels=8).save(tmp_path_factory.mktemp("instructed") / "tiny")


def test_inpaint_with_an_inpainting_model(inpainter: Path, picture: Path, tmp_path: Path) -> None:
    arguments = ["inpaint", str(picture), "a cat", "--mask", "box:3,4,11,9", "--seed", "1"]
    (plain,) = run(inpainter, tmp_path / "out", *arguments)
    (both,) = run(inpainter, tmp_path / "out", *arguments, "--resamples", "2")
    assert record(plain)["edit"] == "Inpaint"
    assert (record(both)["edit"], record(both)["resamples"]) == ("Inpaint, RePaint", 2)
    assert (pixels(plain) != pixels(both)).any()
    image = Image.open(picture)
    expected = LatentDiffusionPipeline.from_pretrained(inpainter)(
        "a cat",
        edits=[Inpaint(image, box_mask("3,4,11,9", image.size))],
        seed=1,
        num_inference_steps=4,
        progress=False,
    )
    assert (pixels(plain) == np.asarray(expected.images[0])).all()


def test_edit_with_an_instructpix2pix_model(
    instructed: Path, picture: Path, tmp_path: Path
) -> None:
    arguments = ["edit", str(picture), "make it red", "--seed", "1"]
    (plain,) = run(instructed, tmp_path / "out", *arguments)
    (near,) = run(instructed, tmp_path / "out", *arguments, "--image-guidance-scale", "4")
    (late,) = run(instructed, tmp_path / "out", *arguments, "--strength", "0.5")
    assert (record(plain)["strength"], record(plain)["image_guidance_scale"]) == (1.0, 1.5)
    pipe = LatentDiffusionPipeline.from_pretrained(instructed)
    for path, edits in (
        (plain, [Instruct(picture)]),
        (near, [Instruct(picture, 4.0)]),
        (late, [SDEdit(picture, 0.5), Instruct(picture)]),
    ):
        output = pipe("make it red", edits=edits, seed=1, num_inference_steps=4, progress=False)
        assert (pixels(path) == np.asarray(output.images[0])).all()


def test_an_edit_checkpoint_says_what_it_is(
    model: Path,
    inpainter: Path,
    instructed: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder, kind in ((inpainter, "inpainting"), (instructed, "instruct-pix2pix")):
        assert main(["info", str(folder)]) == 0
        said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert said["kind"] == kind
    edit = ["edit", str(picture), "a cat", "--steps", "4"]
    for arguments, expected in (
        (["generate", "a cat", "--model", str(inpainter)], "`latentdiff inpaint`"),
        ([*edit, "--model", str(inpainter)], "`latentdiff inpaint`"),
        (["generate", "a cat", "--model", str(instructed)], "`latentdiff edit`"),
        ([*edit, "--model", str(model), "--image-guidance-scale", "2"], "this is none"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line
    assert not (tmp_path / "out").exists()


def test_a_large_picture_is_made_to_fit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (80, 60), "red").save(tmp_path / "large.png")
    arguments = ["inpaint", str(tmp_path / "large.png"), "a cat", "--mask", "box:40,0,41,60"]
    (drawn,) = run(model, tmp_path / "out", *arguments, "--resamples", "1")
    assert Image.open(drawn).size == (16, 12)
    changed = (pixels(drawn) != (255, 0, 0)).any(2).any(0)
    assert changed.sum() == 1  # the column that the narrow box went into
    fitted = "large.png (80 x 60) is made 16 x 12 to fit the model; --no-fit keeps its size"
    assert capsys.readouterr().err.splitlines()[0] == fitted

    (kept,) = run(model, tmp_path / "out", *arguments, "--no-fit", "--resamples", "1")
    assert Image.open(kept).size == (80, 60)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("warning: 80 x 60 pixels are 18.8 times the model's own 16 x 16")
    assert re.search(r"in about 0\.\d\d GB of working memory", said[0])
    assert fitted not in said

    large = [str(tmp_path / "large.png")] * 2
    for option, size in (("--fit", (16, 12)), ("--no-fit", (80, 60))):
        way = ["interpolate", *large, "--prompt", "a cat", "-n", "2", option]
        assert Image.open(run(model, tmp_path / "way", *way)[0]).size == size


def test_ilvr_and_its_options_reach_the_run(model: Path, picture: Path, tmp_path: Path) -> None:
    base = ["ilvr", str(picture), "a cat", "--seed", "3"]
    (plain,) = run(model, tmp_path / "out", *base)
    for option in (
        "--factor 2",
        "--until 1",
        "--space pixels",
        "--guidance-scale 1",
        "--solver ddpm",
    ):
        (other,) = run(model, tmp_path / "out", *base, *option.split())
        assert (pixels(other) != pixels(plain)).any(), option


def test_interpolate(model: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    grid, *way = run(model, out, "interpolate", "a cat", "a dog", "-n", "3", "--grid")
    assert pixels(grid).shape == (16, 48, 3)
    ends = [run(model, out, "generate", text, "--seed", "0")[0] for text in ("a cat", "a dog")]
    for mine, plain in zip((way[0], way[2]), ends, strict=True):
        assert abs(pixels(mine).astype(int) - pixels(plain)).max() <= 1
    pictures = [str(picture), str(picture), "--prompt", "a cat"]
    between = run(model, out, "interpolate", *pictures, "-n", "2", "--steps", "8")
    assert len(between) == 2
    assert abs(pixels(between[0]).astype(int) - pixels(between[1])).max() <= 1
    assert (record(between[0])["steps"], record(way[0])["steps"]) == (8, 4)
    assert "seed" not in record(between[0])  # none has an effect
    hashes: Any = record(between[0])["hashes"]
    assert [name for name, _ in hashes] == [picture.name] * 2


MASKED = {"mask": "box:40,0,60,60", "fit": True, "timetable": "karras", "dtype": "float32"}


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("edit PICTURE cat --mask box:40,0,60,60 --timetable karras", MASKED),
        (
            "inpaint PICTURE cat --resamples 1 --mask box:40,0,60,60 --fit --timetable karras",
            MASKED,
        ),
        (
            "ilvr PICTURE cat --no-fit",
            {"fit": False, "timetable": "trailing", "solver": "dpmpp-2m"},
        ),
        ("ilvr PICTURE cat --fit --dtype bfloat16", {"fit": True, "dtype": "bfloat16"}),
        (
            "inpaint PICTURE cat --resamples 1 --extend left=8 --only-masked",
            {"extend": "left=8", "mask": None, "only_masked": True, "margin": 0.5},
        ),
        ("edit PICTURE cat --engine eager", {"engine": "eager", "edit": "SDEdit"}),
        ("edit PICTURE cat", {"engine": "packed"}),
        ("interpolate cat dog --dtype bfloat16", {"dtype": "bfloat16", "seed": 0}),
    ],
)
def test_the_text_of_a_picture_tells_what_it_was_drawn_with(
    command: str, told: dict[str, object], model: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (80, 60), "red").save(tmp_path / "large.png")
    arguments = command.replace("PICTURE", str(tmp_path / "large.png")).split()
    drawn = run(model, tmp_path / "out", *arguments)[0]
    assert {key: record(drawn).get(key) for key in told} == told


REFUSED = {
    "no such picture": (["edit", "nowhere.png", "a cat"], "nowhere.png"),
    "empty prompt": (["edit", "PICTURE", " "], "empty"),
    "no step": (["edit", "PICTURE", "a cat", "--strength", "0.01"], "less than one step"),
    "too strong": (["edit", "PICTURE", "a cat", "--strength", "1.5"], "--strength"),
    "nothing transparent": (["inpaint", "PICTURE", "a cat"], "transparent"),
    "empty box": (["inpaint", "PICTURE", "a cat", "--mask", "box:20,0,30,9"], "no pixel"),
    "no box": (["inpaint", "PICTURE", "a cat", "--mask", "box:1,2"], "x0,y0,x1,y1"),
    "no mask file": (["inpaint", "PICTURE", "a cat", "--mask", "nowhere.png"], "nowhere.png"),
    "mask of another size": (["inpaint", "PICTURE", "a cat", "--mask", "SMALL"], "4 x 4"),
    "margin of nothing": (
        ["inpaint", "PICTURE", "a cat", "--mask", "box:1,2,4,4", "--margin", "1"],
        "--margin is of --only-masked",
    ),
    "a whole picture of a part": (
        ["inpaint", "PICTURE", "a cat", "--mask", "box:1,2,4,4", "--only-masked", "--no-fit"],
        "--no-fit is of the whole PICTURE",
    ),
    "LoRAs that nothing names": (["edit", "PICTURE", "a cat", "--lora-dir", "."], "--lora-dir"),
    "no space": (["ilvr", "PICTURE", "a cat", "--space", "time"], "--space"),
    "a picture and a prompt": (["interpolate", "PICTURE", "a cat"], "two picture files"),
    "no prompt for pictures": (["interpolate", "PICTURE", "PICTURE"], "--prompt"),
    "a seed for pictures": (
        ["interpolate", "PICTURE", "PICTURE", "--prompt", "a", "--seed", "3"],
        "--seed is for two prompts",
    ),
    "misspelt pictures": (["interpolate", "a.png", "b.png"], "a.png: no such picture"),
    "a prompt for prompts": (["interpolate", "a", "b", "--prompt", "c"], "for two pictures"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_nothing_is_written(
    case: str, model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (4, 4), 255).save(tmp_path / "small.png")
    places = {"PICTURE": str(picture), "SMALL": str(tmp_path / "small.png")}
    arguments, named = REFUSED[case]
    out = tmp_path / "out"
    given = [places.get(one, one) for one in arguments]
    assert main([*given, "--model", str(model), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert not out.exists()

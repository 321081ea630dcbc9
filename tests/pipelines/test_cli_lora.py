"""`--lora` and `latentdiff convert`, on a real tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_bundle

from latentdiff.bundle import Bundle
from latentdiff.cli import main
from latentdiff.cli.models import parse_lora
from latentdiff.errors import UserError
from latentdiff.lora import add_lora, lora_of, save_lora


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle().save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tiny_bundle()
    for parameter in add_lora(bundle, rank=2, text_encoder=True):
        parameter.data.fill_(0.5)
    return save_lora(lora_of(bundle), tmp_path_factory.mktemp("lora") / "a.safetensors")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a:-1", "a", -1.0),
        (r"C:\a.safetensors", r"C:\a.safetensors", 1.0),
        (r"C:\a.safetensors:.5", r"C:\a.safetensors", 0.5),
        ("C:/a", "C:/a", 1.0),
    ],
)
def test_a_scale_follows_the_last_colon(text: str, path: str, scale: float) -> None:
    assert parse_lora(text) == (Path(path), scale)


def test_a_file_with_a_colon_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a:2").touch()
    assert parse_lora(f"{tmp_path}/a:2") == (tmp_path / "a:2", 1.0)


@pytest.mark.parametrize("text", ["a:b", "a:", ":0.5", "a:nan", "a:inf", "a" * 5000 + ":1"])
def test_a_bad_scale_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--lora"):
        parse_lora(text)
    assert main(["generate", "a cat", "--lora", text]) == 2


def test_every_command_that_draws_takes_loras(
    model: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of half strength are one of full; each picture's text names them."""
    picture = tmp_path / "in.png"
    Image.new("RGB", (16, 16), "teal").save(picture)
    for command in (
        ["generate", "a cat"],
        ["edit", str(picture), "a cat"],
        ["inpaint", str(picture), "a cat", "--mask", "box:2,2,12,12", "--resamples", "1"],
        ["ilvr", str(picture), "a cat"],
        ["interpolate", "a cat", "a red heart", "-n", "2"],
    ):
        drawn: list[np.ndarray] = []
        for scales in ([], [1.0], [0.5, 0.5]) if command[0] == "generate" else ([], [1.0]):
            out = tmp_path / command[0] / str(len(scales))
            options = [f"--lora={lora}:{scale}" for scale in scales]
            common = ["--model", str(model), "--out", str(out), "--seed", "1", "--steps", "2"]
            assert main([*command, *common, *options]) == 0, capsys.readouterr().err
            first = min(out.glob("*.png"))
            said = json.loads(Image.open(first).info["latentdiff"])
            wanted = [[str(lora), scale] for scale in scales]
            assert said.get("loras", []) == wanted
            drawn.append(pixels(first))
        assert abs(drawn[1] - drawn[0]).max() > 2, command
        assert abs(drawn[1] - drawn[-1]).max() <= 1, command


def test_a_lora_of_another_model_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.load()  # the bundled model
    add_lora(bundle, rank=1)
    file = save_lora(lora_of(bundle), tmp_path / "a.safetensors")
    options = ["--model", str(model), "--out", str(tmp_path / "out"), "--lora", str(file)]
    assert main(["generate", "a cat", *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "another model" in said
    assert not (tmp_path / "out").exists()

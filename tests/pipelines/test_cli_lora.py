"""`--lora` and `latentdiff convert`, on a real tiny model."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import sd_like, tiny_bundle, unet_of

from latentdiff import LatentDiffusionPipeline
from latentdiff.bundle import Bundle
from latentdiff.cli import main
from latentdiff.cli.models import parse_lora
from latentdiff.errors import UserError
from latentdiff.lora import add_lora, load_lora, lora_of, save_lora


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
            wanted = [[lora.name, scale] for scale in scales]
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


def test_convert_goes_both_ways_and_fuses(
    model: Path,
    lora: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, folder, mixed = tmp_path / "a.safetensors", tmp_path / "b", tmp_path / "c.safetensors"
    assert main(["convert", str(model), str(file)]) == 0
    assert main(["convert", str(file), str(folder)]) == 0
    for part in (
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
        "text_encoder/model",
    ):
        weights = [load_file(place / f"{part}.safetensors") for place in (model, folder)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    said = capsys.readouterr()
    assert "GB" not in said.err
    assert said.out.split() == [str(file), str(folder)]
    monkeypatch.setattr(sys.modules["latentdiff.cli.convert"], "_WORTH_A_LINE", 1)
    assert main(["convert", str(file), str(mixed), f"--lora={lora}:0.5", "--dtype=float16"]) == 0
    said = capsys.readouterr()
    assert f"writing 0.0 GB to {mixed}\n" in said.err
    assert said.out.split() == [str(mixed)]
    assert {value.dtype for value in load_file(mixed).values()} == {torch.float16}
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    pipe.load_lora(lora, 0.5)
    wanted = unet_of(pipe.fuse_loras()).state_dict()
    got = unet_of(Bundle.load(mixed)).state_dict()
    assert all(torch.equal(got[name], wanted[name].half().float()) for name in wanted)

    assert main(["info", str(mixed)]) == 0
    assert main(["convert", str(model), str(folder)]) == 2
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "d")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("tiny", ["scaled by 0.7, not 0.18215", "not CLIP's", "predicts x0", "noise schedule"]),
        ("sd1", ["scaled by 1.0, not 0.18215", "not CLIP's", "a model of version 1"]),
        ("sd2", ["scaled by 1.0, not 0.18215", "tokens, not CLIP's"]),
    ],
)
def test_convert_says_what_others_take_for_granted(
    kind: str, told: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "tiny":
        model = tiny_bundle(process="vp-cosine", prediction="x0")
    else:
        model = replace(sd_like(int(kind[-1]), 2, 1), prediction="v")
    folder, file = model.save(tmp_path / "model"), tmp_path / "a.safetensors"
    assert main(["convert", str(folder), str(file)]) == 0
    line = capsys.readouterr().err
    assert line.startswith("ComfyUI and A1111 will draw it wrongly: ")
    assert line.count("; ") == len(told) - 1
    assert all(part in line for part in told)
    spec = {"v": "v", "x0": None}[model.prediction]
    assert metadata_of(file).get("modelspec.prediction_type") == spec
    assert main(["convert", str(file), str(tmp_path / "again")]) == 0
    assert not capsys.readouterr().err


def test_convert_writes_a_lora_in_another_layout(
    model: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There and back, with the factors as they were; words packed in are named and left out."""
    packed, kohya, back = (tmp_path / f"{name}.safetensors" for name in ("packed", "kohya", "back"))
    values = load_file(lora) | {"bundle_emb.cat.emb_params": torch.ones(1, 16)}
    save_file(values, packed, {"note": "hearts", **metadata_of(lora)})
    base = ["--model", str(model)]
    assert main(["convert", str(packed), str(kohya), *base]) == 0
    assert "words cat in it are left out" in capsys.readouterr().err
    assert all(name.startswith(("lora_unet_", "lora_te_")) for name in load_file(kohya))
    assert (
        main(["convert", str(kohya), str(back), "--layout=diffusers", "--dtype=float16", *base])
        == 0
    )
    bundle = Bundle.load(model)
    first, second, third = (load_lora(path, bundle) for path in (lora, kohya, back))
    assert metadata_of(back)["note"] == "hearts"
    for part, pairs in first.parts():
        for again, half in ((second, False), (third, True)):
            found = dict(again.parts())[part]
            assert found.keys() == pairs.keys()
            for module, pair in pairs.items():
                wanted = pair.up.half().float() if half else pair.up
                assert torch.equal(found[module].up, wanted)
                assert found[module].alpha == pair.alpha
    for arguments, told in (
        ([str(model), str(tmp_path / "x"), "--layout=kohya"], "are for a LoRA, which it is not"),
        ([str(lora), str(tmp_path / "folder"), *base], "one .safetensors file"),
        ([str(lora), str(tmp_path / "y.safetensors"), "--layout=koya", *base], "did you mean"),
        *(
            ([str(lora), str(tmp_path / "z.safetensors"), option, *base], "are for a model, which")
            for option in (f"--lora={lora}", f"--vae={model}", "--prediction=v", "--variant=bf16")
        ),
    ):
        assert main(["convert", *arguments]) == 2
        assert told in capsys.readouterr().err


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}

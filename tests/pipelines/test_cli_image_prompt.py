"""`--image-prompt ADAPTER:PICTURE[:SCALE]` and `--image-encoder`, on a real tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_bundle, tiny_ip_adapter

from latentdiff import ImagePrompt, LatentDiffusionPipeline, SDEdit
from latentdiff.cli import main, output
from latentdiff.models import extension
from latentdiff.models.image_prompts import ImageAdapter
from latentdiff.pictures import save_png


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image-prompt")
    bundle = tiny_bundle()
    bundle.save(folder / "model")
    tiny_ip_adapter(folder, bundle.network).rename(folder / "ip.safetensors")
    (folder / "image_encoder").rename(folder / "clip")
    tiny_ip_adapter(folder / "own", bundle.network, "plus", seed=40)
    pixels = np.random.default_rng(0).integers(0, 256, (14, 16, 3), dtype=np.uint8)
    save_png(Image.fromarray(pixels), folder / "photo.png")
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


BASE = ["--model", "model", "--seed", "3", "--steps", "3", "--solver", "ddim"]
SHOWN = ["--image-prompt", "ip.safetensors:photo.png:0.8", "--image-encoder", "clip"]


def drawn(*arguments: str, capsys: pytest.CaptureFixture[str]) -> np.ndarray:
    assert main([*arguments]) == 0
    path = Path(capsys.readouterr().out.split()[-1])
    return np.asarray(Image.open(path))


def wanted(**call: Any) -> np.ndarray:
    pipe = LatentDiffusionPipeline.from_pretrained("model", engine="eager")
    given: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "solver": "ddim"}
    return np.asarray(pipe("a cat", progress=False, **given | call).images[0])


def test_commands_draw_what_calls_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Alone and with an edit; the picture tells, and is drawn again where its files are named."""
    assert main(["generate", "a cat", *SHOWN, *BASE]) == 0
    path = capsys.readouterr().out.split()[-1]
    prompt = ImagePrompt("ip.safetensors", "photo.png", 0.8, encoder="clip")
    first = np.asarray(Image.open(path))
    assert np.array_equal(first, wanted(image_prompts=[prompt]))
    told = json.loads(Image.open(path).info["latentdiff"])
    assert told["image_prompts"] == ["ip.safetensors:photo.png:0.8"]
    assert told["image_encoder"] == "clip"
    assert main(["generate", "--from", path, "--model", "model"]) == 2
    missing = "add --image-prompt ip.safetensors:photo.png:0.8 --image-encoder clip, with their"
    assert missing in capsys.readouterr().err
    again = ["generate", "--from", path, *SHOWN, "--model", "model"]
    assert np.array_equal(drawn(*again, capsys=capsys), first)

    two = ["--image-prompt", "own:photo.png", "--image-prompt", "own:photo.png:0.5"]
    edit = ["edit", "photo.png", "a cat", "--strength", "0.7", *two, *BASE, "--engine", "eager"]
    prompts = [ImagePrompt("own", "photo.png", scale) for scale in (1.0, 0.5)]
    found = wanted(image_prompts=prompts, edits=[SDEdit("photo.png", 0.7)])
    assert np.array_equal(drawn(*edit, capsys=capsys), found)


def test_an_adapter_is_read_to_the_model_and_sees_its_pictures_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many parts a command draws in: four here, each guided away from nothing."""
    seen: list[tuple[str, torch.dtype]] = []
    for name in ("tokens", "blank_tokens"):
        whole: Any = getattr(ImageAdapter, name)

        def counted(self: ImageAdapter, given: Any, name: str = name, whole: Any = whole) -> Any:
            seen.append((name, self.dtype))
            return whole(self, given)

        monkeypatch.setattr(ImageAdapter, name, counted)

    def copied(*_: object) -> None:
        raise AssertionError("the adapter was copied")

    monkeypatch.setattr(extension.copy, "deepcopy", copied)
    monkeypatch.setattr(output, "_DRAWN_AT_ONCE_BY_CPU", 16 * 16)
    line = ["generate", "a cat", "-n", "4", *SHOWN, *BASE, "--dtype", "bfloat16"]
    assert main(line) == 0  # guided, as each run is by default
    assert seen == [("tokens", torch.bfloat16), ("blank_tokens", torch.bfloat16)]
    grid = ["grid", "a cat", "--x", "steps=2,3", *SHOWN, *BASE, "--dtype", "bfloat16"]
    assert main(grid) == 0
    assert seen == seen[:2] * 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (SHOWN[:2], "image_encoder: no such image encoder"),
        (SHOWN[2:], "--image-encoder is for --image-prompt"),
        (["--image-prompt", "own"], "--image-prompt own: ADAPTER:PICTURE or ADAPTER:PICTURE:SCALE"),
        (["--image-prompt", "none:photo.png"], "none: no such IP-Adapter"),
        (["--image-prompt", "own:none.png"], "none.png: no such picture"),
        (["--image-prompt", "model:photo.png"], "it holds no IP-Adapter"),
        ([*SHOWN[:2], "--image-encoder", "no"], "no: no such image encoder"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a cat", *BASE, *arguments]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1

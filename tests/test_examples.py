"""Every call in README, docs and cards, word for word, where a reader would type it.

The bundled model is a tiny one here, and the real one in the slow test. What a reader brings along
(a model, a LoRA, a folder of pictures) stands in its place under its name on the page.
"""

import contextlib
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scripts import ROOT, script
from shapes import shape_folder
from tiny import (
    tiny_bundle,
    tiny_clip_of_pictures,
    tiny_control,
    tiny_ip_adapter,
    tiny_pixart,
    tiny_upscaler,
    tiny_xl,
    with_fast,
)

from latentdiff import Bundle
from latentdiff.cli import main
from latentdiff.editing import box_mask
from latentdiff.formats import location
from latentdiff.learning.finetune_config import resolve
from latentdiff.lora import add_lora, lora_of, save_lora
from latentdiff.pictures import fit, open_picture, save_png

PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("assets/*/README.md")]
)
PAGES.remove(ROOT / "docs/server.md")  # its clients need the server that tests/server starts
CONFIGS = {
    **{stage: f"{stage.capitalize()}Config" for stage in ("autoencoder", "diffusion", "distill")},
    "denoising_gan": "GanConfig",
    "energy": "EnergyConfig",
    "joint": "JointConfig",
}
# Runs of minutes, of machines or without an end, and where else they are run.
ELSEWHERE = {
    "pip": ".ci/run",
    "python3": ".ci/run",
    "sudo": ".ci/run",
    "latentdiff data emoji": "tests/data/test_emoji.py",
    "latentdiff data compose": "tests/data/test_composition.py",
    "latentdiff serve": "tests/server",
    "latentdiff finetune": "tests/training/test_commands.py",
    "latentdiff train": "tests/training/test_commands.py",
    "latentdiff compile": "tests/models/test_compiled.py",
}


def examples(page: Path) -> Iterator[str | list[str]]:
    """Python of a page, and the words of each command in a block or between backticks, in order."""
    text = page.read_text("utf-8")
    every = r"```(\w*)\n(.*?)```|`(latentdiff [^`]*(?:\"|MY/|--config )[^`]*)`"
    for language, block, inline in re.findall(every, text, re.DOTALL):
        if language == "python":
            yield block
        elif language in ("", "sh"):
            for line in (block or inline).splitlines():
                yield from commands(line)


def commands(line: str) -> Iterator[list[str]]:
    """The words of the commands of a line, without the variables before them."""
    for part in line.split("&&"):
        with contextlib.suppress(ValueError):  # a drawing of boxes and arrows
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words and not {"->", "PICTURE", "MODEL"} & {*words}:
                yield words


def is_elsewhere(words: list[str]) -> bool:
    return any(" ".join(words).startswith(name) for name in ELSEWHERE)


SHOWING = [
    page
    for page in PAGES
    if any(isinstance(one, str) or one[0] == "latentdiff" for one in examples(page))
]


def bring(folder: Path, bundle: Bundle) -> None:
    """What readers have: models of the bundled one's shape, LoRAs for it, pictures."""
    for name in ("assets", "training", "pipelines"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs/pictures").mkdir(parents=True)
    for path in (ROOT / "docs/pictures").glob("*.png"):
        picture = fit(open_picture(path), max(bundle.size))
        save_png(picture, folder / path.relative_to(ROOT))
    for name in (
        *("bundled/emoji128", "path/to/stable-diffusion", "models/mine", "runs/mine/model"),
        *(
            "runs/emoji64-diffusion/model",
            "runs/emoji128/model",
            "v1-5-pruned-emaonly.safetensors",
        ),
        *(f"runs/emoji128-{run}/model" for run in ("distill", "gan", "energy", "joint")),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        bundle.save(folder / name)
    with_fast(folder / "bundled/emoji128")
    tiny_upscaler().save(folder / "bundled/emoji128-enlarge")
    tiny_xl().save(folder / "path/to/sdxl")
    tiny_xl(refiner=True).save(folder / "path/to/sdxl-refiner")
    tiny_bundle(in_channels=9).save(folder / "path/to/inpainting-model")
    tiny_bundle(in_channels=8).save(folder / "path/to/instruct-pix2pix-model")
    pixart = tiny_pixart()
    pixart.save(folder / "path/to/pixart")
    add_lora(pixart, rank=2)
    save_lora(lora_of(pixart), folder / "runs/pixart/pytorch_lora_weights.safetensors")
    tiny_upscaler().save(folder / "path/to/upscaler")
    tiny_upscaler("waves").save(folder / "runs/enlarge/model")
    tiny_clip_of_pictures().save(folder / "path/to/clip")
    tiny_control().save_pretrained(folder / "path/to/controlnet-canny")
    adapter = tiny_ip_adapter(folder / "path/to", tiny_bundle().network)
    adapter.rename(adapter.with_name("ip-adapter_sd15.safetensors"))
    taught = Bundle.load(folder / "models/mine", device="cpu")
    for parameter in add_lora(taught, rank=2):
        torch.nn.init.normal_(parameter, std=0.01, generator=torch.Generator().manual_seed(1))
    for name in (
        *("watercolour.safetensors", "pixel-style.safetensors"),
        *(f"runs/{run}/pytorch_lora_weights.safetensors" for run in ("cats", "PICTURES-lora")),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_lora(lora_of(taught), folder / name)
    words = torch.randn(2, taught.conditioner.width, generator=torch.Generator().manual_seed(2))
    save_file({"<my-style>": words[0].clone()}, folder / "learned_embeds.safetensors")
    save_file({"emb_params": words}, folder / "easynegative.safetensors")
    photo = open_picture(ROOT / "docs/pictures/photo.png")
    save_png(photo, folder / "photo.png")
    save_png(box_mask("60,10,90,50", photo.size).convert("RGB"), folder / "mask.png")
    (folder / "prompts.txt").write_text("a red heart\na cat face\n")
    (folder / "story.txt").write_text("a red heart and " * 12)
    (folder / "MY").mkdir()
    shape_folder(folder / "MY/PICTURES")


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    bring(folder, replace(tiny_bundle(), captions=("a red heart", "a flower")))
    return folder


def run_page(page: Path) -> int:
    """Run the examples of a page in their order; returns how many there were."""
    given: dict[str, Any] = {}
    count = 0
    for example in examples(page):
        if isinstance(example, str):
            exec(compile(example, str(page), "exec"), given)
        elif example[0] == "latentdiff" and not is_elsewhere(example):
            assert main(example[1:]) == 0, example
        else:
            continue
        count += 1
    return count


# 100 steps of inversion and as many pictures; thirty solvers and guides; measurements.
LONG = tuple(ROOT / page for page in ("docs/editing.md", "docs/methods.md", "docs/training.md"))


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] if p in LONG else []) for p in SHOWING],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_example_runs(page: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_world)
    shutil.rmtree("outputs", ignore_errors=True)  # of other pages: names on a page are its own
    if "assets" not in page.parts:  # a card is of its own model
        monkeypatch.setattr(location, "_bundled", lambda name: tiny_world / "bundled" / name)
    run_page(page)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/editing.md", "docs/guidance.md"])
def test_every_example_runs_with_the_bundled_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(tmp_path, Bundle.load(None, device="cpu"))
    monkeypatch.chdir(tmp_path)
    assert run_page(ROOT / name) >= 3


def launched(words: list[str]) -> tuple[Path, list[str]] | None:
    """A script of this repository that a command starts, and its arguments."""
    for command in (["latentdiff", "train"], ["latentdiff"]):
        path = ROOT / f"training/{words[len(command)]}.py" if len(words) > len(command) else None
        if words[: len(command)] == command and path is not None and path.is_file():
            return path, words[len(command) + 1 :]
    if words[:2] == ["accelerate", "launch"]:
        words = words[2:]
    elif words[0] in ("python", "torchrun"):
        words = words[1:]
    else:
        return None
    at = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
    return None if at is None else (ROOT / words[at], words[at + 1 :])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_training_command_is_understood(page: Path) -> None:
    """Runs of minutes: their scripts, options, files and settings are there."""
    for words in examples(page):
        found = None if isinstance(words, str) else launched(words)
        if found is None:
            continue
        path, arguments = found
        source = path.read_text("utf-8")
        for word in arguments:
            if word.startswith("--"):
                option = word[2:].partition("=")[0].removeprefix("no-")
                assert re.search(rf'"--{option}"|\b{option.replace("-", "_")}: ', source), words
            if word.startswith("training/configs/"):
                assert (ROOT / word).is_file(), words
        changes = [word for word in arguments if re.match(r"[a-z_.]+=", word)]
        if path.stem in CONFIGS:
            module = script(path.stem)
            kind = getattr(module, CONFIGS[path.stem])
            config = ROOT / arguments[arguments.index("--config") + 1]
            encoded = [*changes, *config.read_text("utf-8").splitlines()]
            told = any(line.startswith(("vae=", "vae:", "haar:")) for line in encoded)
            if path.stem == "diffusion" and not told:
                changes.append("vae=vae")
            module.load_config(kind, config, changes)
        if path.stem == "finetune":
            named = "--method" in arguments
            method = arguments[arguments.index("--method") + 1] if named else "lora"
            resolve({"method": method, "data": {"root": "MY/PICTURES"}}, "a page")

"""Everything that saves, on a full disk and beside strangers' files: one line, and nothing half."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from kill_writers import contents
from PIL import Image
from safetensors.torch import load_file, save_file
from test_files import files_no_larger_than
from tiny import clip_tokenizer, tiny_bundle, vae_of
from torch import nn

from latentdiff.bundle import Bundle
from latentdiff.data.cache import TensorCache
from latentdiff.data.packing import write_shards
from latentdiff.errors import UserError
from latentdiff.files import write_json
from latentdiff.formats.diffusers_save import save_network
from latentdiff.guidance.classifier import Classifier
from latentdiff.guidance.clip import Clip
from latentdiff.learning.card import write_between
from latentdiff.learning.checkpoint import save_checkpoint
from latentdiff.learning.textual_inversion import WordRows, add_words, clips_of, save_words
from latentdiff.lora import add_lora, lora_of, save_lora
from latentdiff.models.classifier import LatentClassifier
from latentdiff.models.fresh_clip import build_clip
from latentdiff.pictures import save_numbered_png, save_png

BUNDLE = tiny_bundle()


def noise() -> Image.Image:
    pixels = torch.randint(256, (24, 24, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def bundle() -> Bundle:
    """A model of other weights each time."""
    with torch.no_grad():
        for network in BUNDLE.modules.values():
            nn.init.normal_(next(network.parameters()))
    return BUNDLE


def save_a_lora(path: Path) -> None:
    model = copy.deepcopy(BUNDLE)
    for parameter in add_lora(model, rank=2, text_encoder=True):
        nn.init.normal_(parameter)
    save_lora(lora_of(model), path)


def save_two_words(path: Path) -> None:
    own = replace(BUNDLE, conditioner=copy.deepcopy(BUNDLE.conditioner))
    model = add_words(own, ["<a>", "<b>"])
    (tower,) = clips_of(model).values()
    words = tower.model.get_input_embeddings()
    assert isinstance(words, WordRows)
    nn.init.normal_(words.rows)
    save_words(model, ["<a>", "<b>"], path)


def save_clip(path: Path) -> None:
    model = build_clip(
        clip_tokenizer(), image_size=12, patch=4, width=16, layers=1, text_layers=1, heads=2
    )
    Clip(model, clip_tokenizer()).save(path)


def save_classifier(path: Path) -> None:
    Classifier(LatentClassifier(4, ["cat", "dog"], 8)).save(path)


def cache_latents(path: Path) -> None:
    values = torch.randn(2, 99)
    TensorCache(path, "w").fetch(["a", "b"], lambda places: values[places], progress=False)


def pack(path: Path) -> None:
    write_shards(path.with_name("pictures"), path, 2)


def edit_page(path: Path) -> None:
    write_between(path, "<b>", "</b>", f"{torch.randint(100, 999, (99,)).tolist()}")


def checkpoint(path: Path) -> None:
    tensors = {"model": {"w": torch.randn(99)}, "optimizer": {"0.step": torch.ones(())}}
    save_checkpoint(path, int(torch.randint(9, ())), tensors, {"seed": 1})


@dataclass(frozen=True)
class Saver:
    """A way to save, where to, and whether once more over what it wrote."""

    save: Callable[[Path], object]
    name: str
    again: bool = True


SAVERS = {
    "model folder": Saver(lambda path: bundle().save(path), "made/model"),
    "model file": Saver(lambda path: bundle().save(path), "made/a.safetensors"),
    "autoencoder": Saver(lambda path: save_network(vae_of(bundle()), path), "vae"),
    "classifier": Saver(save_classifier, "classifier"),
    "CLIP": Saver(save_clip, "clip"),
    "LoRA": Saver(save_a_lora, "made/a.safetensors"),
    "words": Saver(save_two_words, "made"),
    "checkpoint": Saver(checkpoint, "checkpoints"),
    "latents": Saver(cache_latents, "cache", again=False),
    "shards": Saver(pack, "shards", again=False),
    "page": Saver(edit_page, "page.md"),
    "report": Saver(lambda path: write_json(path, [1] * 99, replace=True), "a.json"),
    "picture": Saver(lambda path: save_png(noise(), path), "a.png", again=False),
    "picture again": Saver(lambda path: save_png(noise(), path, replace=True), "a.png"),
    "numbered picture": Saver(lambda path: save_numbered_png(noise(), path, 7), "pictures"),
}


def prepare(folder: Path) -> None:
    """Write the files that some savers need."""
    (folder / "pictures").mkdir(parents=True)
    for number in range(3):
        noise().save(folder / f"pictures/{number}.png")
        (folder / f"pictures/{number}.txt").write_text("noise")
    (folder / "page.md").write_text("a <b></b> c")


def without_empty_folders(folder: Path) -> dict[str, bytes | None]:
    return {name: data for name, data in contents(folder).items() if data is not None}


@pytest.mark.parametrize("name", SAVERS)
def test_a_full_disk_at_any_file_is_one_line_and_all_is_as_it_was(
    name: str, tmp_path: Path
) -> None:
    saver = SAVERS[name]
    for folder in ("trial", "real"):
        prepare(tmp_path / folder)
    before = contents(tmp_path / "trial")
    saver.save(tmp_path / "trial" / saver.name)
    new = contents(tmp_path / "trial")
    sizes = {len(data) - 1 for file, data in new.items() if data and data != before.get(file)}
    folder = tmp_path / "real"
    for _ in range(1 + saver.again):
        before = without_empty_folders(folder)
        for size in sorted({0} | sizes):
            with files_no_larger_than(size), pytest.raises(UserError) as caught:
                saver.save(folder / saver.name)
            told = str(caught.value)
            assert "\n" not in told
            assert "File too large" in told
            assert without_empty_folders(folder) == before
        saver.save(folder / saver.name)
        assert without_empty_folders(folder) != before or name == "report"
    assert not list(folder.rglob(".*"))


STRANGERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("years of work"),
    "tensors": lambda path: save_file({"x": torch.ones(2, 2)}, path),
    "no tensors": lambda path: save_file({}, path),
    "SDXL": lambda path: save_file(
        {
            "model.diffusion_model.label_emb.0.0.weight": torch.ones(2),
            "conditioner.x": torch.ones(2),
        },
        path,
    ),
    "damaged model": lambda path: path.write_bytes(
        BUNDLE.save(path.with_name("m.safetensors")).read_bytes()[:999]
    ),
    "model": bundle().save,
    "LoRA": save_a_lora,
    "word": lambda path: save_file({"<a>": torch.ones(9)}, path),
    "folder": lambda path: (path.mkdir(), (path / "thesis.txt").write_text("years")),
    "web project": lambda path: (path.mkdir(), (path / "config.json").write_text('{"port": 1}')),
    "damaged folder": lambda path: (path.mkdir(), (path / "model_index.json").write_text("{")),
    "link to nothing": lambda path: path.symlink_to("nothing"),
}
OWN = {"model file": {"model"}, "LoRA": {"LoRA"}, "words": {"word"}}
FILES = {
    "model file": lambda path: bundle().save(path),
    "LoRA": save_a_lora,
    "words": lambda path: save_two_words(path.parent),
}


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_replaced_by_its_kind_only(name: str, stranger: str, tmp_path: Path) -> None:
    target = tmp_path / "learned_embeds-1.safetensors"
    STRANGERS[stranger](target)
    before = contents(tmp_path)
    if stranger in OWN[name]:
        FILES[name](target)
        assert contents(tmp_path) != before
        assert load_file(target)
    else:
        told = "so it stays; name another|already exists"
        with pytest.raises(UserError, match=told) as caught:
            FILES[name](target)
        assert "\n" not in str(caught.value)
        assert contents(tmp_path) == before


FOLDERS = {
    "model": lambda path: bundle().save(path),
    "autoencoder": lambda path: save_network(vae_of(bundle()), path),
    "CLIP": save_clip,
    "classifier": save_classifier,
}


@pytest.mark.parametrize("stranger", ["text", "folder", "web project", "damaged folder"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_replaced_by_its_kind_only(name: str, stranger: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    STRANGERS[stranger](target)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="so it stays; name another") as caught:
        FOLDERS[name](target)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before
    shutil.rmtree(target, ignore_errors=True)
    target.unlink(missing_ok=True)
    target.mkdir()
    for _ in range(2):  # an empty folder, and one of its own
        FOLDERS[name](target)
    index = "model_index.json" if name == "model" else "config.json"
    assert json.loads((target / index).read_text())

"""Every method of fine-tuning on a tiny model of Stable Diffusion XL: what changes, what stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scripts import picture_folder, script
from tiny import WIDTH, WIDTH_2, tiny_xl

from latentdiff.bundle import Bundle
from latentdiff.learning.finetune_config import resolve
from latentdiff.pictures import open_picture
from latentdiff.pipeline import Control, LatentDiffusionPipeline

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xl")
    picture_folder(folder / "pictures")
    tiny_xl().save(folder / "model")
    return folder


def finetune(work: Path, out: Path, method: str, **sections: Any) -> Path:
    values: dict[str, Any] = {
        "precision": "no",
        "optim": {"steps": 2, "batch_size": 4, "lr": 1e-2, "warmup": 0},
        "checkpoint_every": 2,
        "save_dtype": "float32",
        "sample_prompts": ["a red disc"],
        "method": method,
        "out": str(out),
        "model": str(work / "model"),
        "data": {"root": str(work / "pictures")},
        "prior": {"prompts": []},
    }
    script("finetune").train(resolve(values | sections, "test"), False)
    return out


def weights(model: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (model / part).glob("*.safetensors")
    return load_file(file)


def changed(work: Path, model: Path) -> dict[str, set[str]]:
    """By part the tensors that differ, those of other shapes too."""
    found: dict[str, set[str]] = {}
    for part in PARTS:
        before, after = weights(work / "model", part), weights(model, part)
        assert before.keys() == after.keys()
        same = {n for n, v in before.items() if v.shape == after[n].shape}
        same = {n for n in same if torch.equal(before[n], after[n])}
        if before.keys() - same:
            found[part] = before.keys() - same
    return found


def test_a_lora_of_all_three_networks(work: Path, tmp_path: Path) -> None:
    """It loads, it draws, and its text encoders were seen by the loss."""
    lora = {"rank": 2, "text_encoder": True, "layout": "kohya"}
    out = finetune(work, tmp_path / "out", "lora", lora=lora)
    values = load_file(out / "pytorch_lora_weights.safetensors")
    for start in ("lora_unet_input_blocks_", "lora_te1_text_model_", "lora_te2_text_model_"):
        ups = [v for n, v in values.items() if n.startswith(start) and n.endswith("up.weight")]
        assert any(bool(up.any()) for up in ups), start
    pipe = LatentDiffusionPipeline.from_pretrained(work / "model")
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    plain = pipe("a red disc", progress=False, **call).images
    pipe.load_lora(out / "pytorch_lora_weights.safetensors")
    assert not torch.equal(pipe("a red disc", progress=False, **call).images, plain)
    with open_picture(next(out.rglob("samples*.png"))) as grid:
        assert grid.size[0] >= 16


@pytest.mark.parametrize(
    ("method", "sections", "parts"),
    [
        ("full", {}, {"unet"}),
        ("full", {"train_text": True}, {"unet", "text_encoder", "text_encoder_2"}),
        ("full", {"inpaint": True}, {"unet"}),
        (
            "dreambooth",
            {"prior": {"prompts": ["a disc"], "count": 2, "steps": 2}},
            {"unet"},
        ),
    ],
)
def test_what_learns_is_saved_and_nothing_else(
    method: str, sections: dict[str, Any], parts: set[str], work: Path, tmp_path: Path
) -> None:
    if method == "dreambooth":
        root = str(work / "pictures")
        sections = sections | {"data": {"root": root, "instance_prompt": "a sks disc"}}
    model = finetune(work, tmp_path / "out", method, **sections) / "model"
    found = changed(work, model)
    assert found.keys() == parts
    if "inpaint" not in sections:  # the time, sizes and pooled text reach the loss
        assert {"add_embedding.linear_1.weight", "conv_in.weight"} <= found["unet"]
    bundle = Bundle.load(model)
    assert bundle.family == "stable-diffusion-xl"
    assert bundle.kind == ("inpainting" if "inpaint" in sections else "text-to-image")


def test_a_control_network_beside_it(work: Path, tmp_path: Path) -> None:
    out = finetune(work, tmp_path / "out", "controlnet", control={"embedding": [8, 16]})
    (config,) = (path for path in out.rglob("config.json") if "ControlNet" in path.read_text())
    pipe = LatentDiffusionPipeline.from_pretrained(work / "model")
    picture = open_picture(next((work / "pictures").glob("*.png"))).resize((16, 16))
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    control = Control(config.parent, picture, kind="canny")
    drawn = pipe("a red disc", controls=[control], progress=False, **call).images
    assert not torch.equal(drawn, pipe("a red disc", progress=False, **call).images)


def test_a_new_word_is_a_row_in_both_encoders(work: Path, tmp_path: Path) -> None:
    root = {"root": str(work / "pictures"), "instance_prompt": "a <mine> disc"}
    out = finetune(
        work, tmp_path / "out", "textual-inversion", data=root, inversion={"tokens": ["<mine>"]}
    )
    rows = load_file(out / "learned_embeds.safetensors")
    assert {n: v.shape for n, v in rows.items()} == {"clip_l": (1, WIDTH), "clip_g": (1, WIDTH_2)}
    tables = {part: {"text_model.embeddings.token_embedding.weight"} for part in PARTS[2:]}
    assert changed(work, out / "model") == tables
    for part, name in zip(PARTS[2:], ("clip_l", "clip_g"), strict=True):
        before, after = weights(work / "model", part), weights(out / "model", part)
        (table,) = tables[part]
        assert torch.equal(after[table][: len(before[table])], before[table])
        assert torch.equal(after[table][-1], rows[name][0])
        assert (after[table][-1] - before[table].mean(0)).abs().max() > 1e-3  # it has learned
    whole = Bundle.load(out / "model")
    wanted = whole.conditioner.encode(["a <mine>", "a heart"], whole.size).condition
    pipe = LatentDiffusionPipeline.from_pretrained(work / "model")
    assert pipe.load_textual_inversion(out) == ["<mine>"]
    got = pipe.bundle.conditioner.encode(["a <mine>", "a heart"], whole.size).condition
    for name in ("states", "pooled"):
        assert torch.equal(got.given()[name], wanted.given()[name])
        assert not torch.equal(got.given()[name][0], got.given()[name][1])

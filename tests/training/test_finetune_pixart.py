"""Fine-tuning a tiny model of PixArt: what changes, what stays, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scripts import picture_folder, script
from tiny import tiny_pixart

from latentdiff.bundle import Bundle
from latentdiff.errors import UserError
from latentdiff.learning.distillation import with_guidance_input
from latentdiff.learning.finetune_config import resolve
from latentdiff.pipeline import LatentDiffusionPipeline


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixart")
    picture_folder(folder / "pictures")
    tiny_pixart().save(folder / "model")
    tiny_pixart(sizes=True, side=8).save(folder / "sizes")
    return folder


def finetune(work: Path, out: Path, method: str, model: str = "model", **sections: Any) -> Path:
    values: dict[str, Any] = {
        "precision": "no",
        "optim": {"steps": 2, "batch_size": 4, "lr": 1e-2, "warmup": 0},
        "checkpoint_every": 2,
        "save_dtype": "float32",
        "sample_prompts": ["a red disc"],
        "method": method,
        "out": str(out),
        "model": str(work / model),
        "data": {"root": str(work / "pictures"), "size": 16},
        "prior": {"prompts": []},
    }
    config = resolve(values | sections, "test")
    assert config.preset == "pixart"
    script("finetune").train(config, False)
    return out


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_lora_of_its_transformer(work: Path, checkpoints: bool, tmp_path: Path) -> None:
    out = finetune(
        work,
        tmp_path / "out",
        "lora",
        lora={"rank": 2, "targets": "transformer"},
        gradient_checkpointing=checkpoints,
    )
    values = load_file(out / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.") for name in values)
    ups = [value for name, value in values.items() if name.endswith("lora_B.weight")]
    assert len(ups) == 2 * 10 + 1
    # The last layer's second half is a variance, which no loss is told.
    assert all(bool(value.any()) for value in ups)
    assert not values["transformer.proj_out.lora_B.weight"].view(2, 2, 8, 2)[:, :, 4:].any()
    assert "Diffusers does not read these files." in (out / "README.md").read_text()
    pipe = LatentDiffusionPipeline.from_pretrained(work / "model")
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    plain = pipe("a red disc", progress=False, **call).images
    pipe.load_lora(out)
    assert not torch.equal(pipe("a red disc", progress=False, **call).images, plain)


def test_every_weight_that_is_told_learns(work: Path, tmp_path: Path) -> None:
    """Times, texts and sizes reach the loss, and nothing else changes."""
    model = finetune(work, tmp_path / "out", "full", "sizes") / "model"
    for part in ("transformer", "vae", "text_encoder"):
        (before,), (after,) = (
            [load_file(file) for file in (folder / part).glob("*.safetensors")]
            for folder in (work / "sizes", model)
        )
        same = [name for name, value in before.items() if torch.equal(value, after[name])]
        assert same == ([] if part == "transformer" else list(before))
    bundle = Bundle.load(model)
    assert (bundle.family, bundle.network.part) == ("pixart", "transformer")


def test_what_is_not_trained_of_it_is_one_line(work: Path, tmp_path: Path) -> None:
    root = str(work / "pictures")
    inversion: dict[str, Any] = {"inversion": {"tokens": ["<mine>"]}}
    inversion["data"] = {"root": root, "instance_prompt": "a <mine> disc"}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("full", {"inpaint": True}, "has a transformer, which is not given an input for masks"),
        ("controlnet", {}, "a ControlNet is trained beside U-Nets of our own alone"),
        ("textual-inversion", inversion, "CLIP"),
        ("lora", {"lora": {"text_encoder": True}}, "only a CLIP text encoder can have a LoRA"),
    ]
    for number, (method, sections, line) in enumerate(cases):
        with pytest.raises(UserError, match=line):
            finetune(work, tmp_path / f"{number}", method, **sections)
    with pytest.raises(UserError, match="a transformer, which is not told its guidance scale"):
        with_guidance_input(tiny_pixart())

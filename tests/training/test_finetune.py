"""Every method of fine-tuning on twelve pictures and a tiny model: what changes, what stays."""

import json
import shutil
import sys
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import typer
from diffusers.models.controlnets.controlnet import ControlNetModel
from PIL import Image, ImageOps
from safetensors.torch import load_file
from scripts import picture_folder, script
from tiny import WINDOW, tiny_bundle, tiny_xl, tower_of
from typer.testing import CliRunner

from latentdiff.bundle import Bundle
from latentdiff.data.folder import read_folder
from latentdiff.data.packing import write_shards
from latentdiff.data.variants import Variant, variants
from latentdiff.diffusion import process as processes
from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.process import DiscreteVP
from latentdiff.editing import Inpaint
from latentdiff.editing.control_pictures import control_picture
from latentdiff.editing.run_context import RunContext
from latentdiff.errors import UserError
from latentdiff.learning.checkpoint import checkpoints
from latentdiff.learning.control_pictures import ControlPictures
from latentdiff.learning.finetune_config import ControlConfig, resolve
from latentdiff.learning.held_out import put_aside
from latentdiff.learning.inpainting_masks import WHOLE, Holes, draw_mask, with_mask_input
from latentdiff.learning.presets import prior_captions
from latentdiff.learning.run import Run
from latentdiff.learning.samples import Samples
from latentdiff.learning.textual_inversion import word_files
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.pictures import open_picture, to_pil, to_uint8
from latentdiff.pipeline import Control, LatentDiffusionPipeline

BASE = {
    "precision": "no",
    "optim": {"steps": 4, "batch_size": 4, "lr": 1e-2, "warmup": 0},
    "checkpoint_every": 2,
    "prior": {"steps": 2},
    "save_dtype": "float32",
    "sample_prompts": ["a red disc"],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pictures`, and `model`, a tiny bundle as a folder."""
    folder = tmp_path_factory.mktemp("finetune")
    picture_folder(folder / "pictures")
    tiny_bundle().save(folder / "model")
    return folder


def finetune(work: Path, out: Path, method: str, *, dry: bool = False, **sections: object) -> Path:
    """One run in this process."""
    values: dict[str, object] = {
        **BASE,
        "method": method,
        "out": str(out),
        "model": str(work / "model"),
    }
    data = {"root": str(work / "pictures")}
    for name, section in {"data": {}, **sections}.items():
        below = data if name == "data" else values.get(name)
        both = isinstance(below, dict) and isinstance(section, dict)
        values[name] = {**below, **section} if both else section  # pyright: ignore
    script("finetune").train(resolve(values, "test"), dry)
    return out


def weights(model: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (model / part).glob("*.safetensors")
    return load_file(file)


def changed(work: Path, model: Path, part: str) -> set[str]:
    before, after = weights(work / "model", part), weights(model, part)
    assert before.keys() == after.keys()
    return {
        name
        for name, value in before.items()
        if value.shape != after[name].shape or not torch.equal(value, after[name])
    }


def test_lora_leaves_a_file_that_draws_and_a_run_that_resumes_exactly(
    work: Path, tmp_path: Path
) -> None:
    """With all that draws at random: dropout, flips, crops, caption choice, prior pictures."""
    settings = {
        "lora": {"rank": 2, "dropout": 0.2, "text_encoder": True},
        "data": {"flip": True, "crops": 2},
        "prior": {"steps": 2, "prompts": ["a disc"], "count": 3},
        "objective": {"offset_noise": 0.1},
    }
    out = finetune(work, tmp_path / "out", "lora", **settings)
    file = out / "pytorch_lora_weights.safetensors"
    first = load_file(file)
    assert any("unet" in name for name in first)
    assert any("text_encoder" in name for name in first)
    pipe = LatentDiffusionPipeline.from_pretrained(work / "model")
    plain = pipe("a red disc", num_inference_steps=2, seed=0, output_type="pt", progress=False)
    pipe.load_lora(file)
    styled = pipe("a red disc", num_inference_steps=2, seed=0, output_type="pt", progress=False)
    assert (plain.images - styled.images).abs().max() > 1e-3
    whole = pipe("a red disc", num_inference_steps=20, guidance_scale=4.0, seed=0, progress=False)
    shown = open_picture(out / "pictures/samples-00000004.png")
    gap = np.abs(np.asarray(shown, int) - np.asarray(whole.images[0], int)).max()
    assert gap <= 1  # samples are drawn without dropout, in the text encoder too

    newest = checkpoints(out / "checkpoints")[0]
    assert newest.name == "step-00000004"
    shutil.rmtree(newest)
    file.unlink()
    shutil.rmtree(out / "cache")  # costs time only
    finetune(work, out, "lora", **settings)
    again = load_file(file)
    assert first.keys() == again.keys()
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("kind", [pytest.param("loha", marks=pytest.mark.slow), "lokr", "dora"])
def test_a_lora_of_another_kind_leaves_a_file_that_draws_and_resumes_exactly(
    work: Path, tmp_path: Path, kind: str
) -> None:
    settings = {"lora": {"rank": 2, "kind": kind, "layout": "kohya"}, "prior": {"prompts": []}}
    out = finetune(work, tmp_path / "out", "lora", **settings)
    file = out / "pytorch_lora_weights.safetensors"
    first = load_file(file)
    ends = {"loha": "hada_w1_a", "lokr": "lokr_w1", "dora": "dora_scale"}
    assert any(name.endswith(ends[kind]) for name in first)
    pipe = LatentDiffusionPipeline.from_pretrained(work / "model")
    rest: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    plain = pipe("a red disc", progress=False, **rest).images
    pipe.load_lora(file)
    assert not torch.equal(plain, pipe("a red disc", progress=False, **rest).images)
    shutil.rmtree(checkpoints(out / "checkpoints")[0])
    file.unlink()
    finetune(work, out, "lora", **settings)
    again = load_file(file)
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("optimizer", ["prodigy", "schedule-free", "muon"])
def test_a_run_goes_on_exactly_with_every_optimizer(
    work: Path, tmp_path: Path, optimizer: str
) -> None:
    """And however often it is drawn in between."""
    method = "full" if optimizer == "muon" else "lora"
    settings = {"optimizer": optimizer, "checkpoint_every": 1}
    optim: dict[str, object] = {"steps": 3, "batch_size": 4, "warmup": 1}
    if optimizer == "schedule-free":
        optim |= {"schedule": "constant"}
    whole = finetune(work, tmp_path / "whole", method, optim=optim, evaluate_every=1, **settings)
    cut = finetune(work, tmp_path / "cut", method, optim=optim, **settings)
    shutil.rmtree(checkpoints(cut / "checkpoints")[0])
    finetune(work, cut, method, optim=optim, **settings)
    names = "checkpoints/step-00000003/model", "checkpoints/step-00000003/optimizer"
    for name in (*names, *(["pytorch_lora_weights"] if method == "lora" else [])):
        first, again = (load_file(run / f"{name}.safetensors") for run in (whole, cut))
        assert first.keys() == again.keys()
        assert all(torch.equal(value, again[key]) for key, value in first.items()), name


def test_a_held_out_loss_tells_of_the_weights_alone_and_the_best_ones_are_left(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal at step 0 whatever the seed; rates that ruin the model end the run, but not its
    result; and a resumed run is the uninterrupted one."""
    held = {"fraction": 0.25, "every": 1, "keep": "best", "patience": 2}
    optim = {"steps": 9, "batch_size": 4, "lr": 2e-1, "warmup": 0, "schedule": "constant"}
    settings = {"held_out": held, "optim": optim, "checkpoint_every": 1, "lora": {"rank": 2}}
    lines: dict[str, list[dict[str, float]]] = {}
    for name, seed in {"one": 0, "other": 7, "cut": 0}.items():
        out = finetune(work, tmp_path / name, "lora", seed=seed, **settings)
        if name == "cut":
            shutil.rmtree(checkpoints(out / "checkpoints")[0])
            finetune(work, out, "lora", seed=seed, **settings)
        log = (out / "log.jsonl").read_text()
        lines[name] = [row for row in map(json.loads, log.splitlines()) if "held_out" in row]
    assert "3 held out to measure on" in (said := capsys.readouterr().out)
    assert lines["one"] == lines["cut"] != lines["other"]
    assert lines["one"][0] == lines["other"][0]
    losses = {row["step"]: row["held_out"] for row in lines["one"][1:]}
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == best + 2 < 9  # it ended early
    assert f"the weights of step {best}, " in said
    first, again = (
        load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "cut")
    )
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    newest = load_file(checkpoints(tmp_path / "one/checkpoints")[0] / "best.safetensors")
    kept = next(value for key, value in newest.items() if "lora_B" in key)
    assert any(torch.equal(kept, value) for value in first.values())
    drawn = {path.name for path in (tmp_path / "one/pictures").iterdir()}
    assert {f"samples-best-{best:08}.png", "held-out-00000000.png"} <= drawn
    assert f"| steps | {best + 2} |" in (tmp_path / "one/README.md").read_text()


def test_latents_that_another_run_made_are_read(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, optim = {"latents": str(tmp_path / "latents")}, {"steps": 1, "batch_size": 4}
    first = finetune(work, tmp_path / "first", "full", data=data, optim=optim)
    assert list((tmp_path / "latents").rglob("*.safetensors"))

    def none(self: object, pictures: object) -> torch.Tensor:
        raise AssertionError("a picture is encoded again")

    monkeypatch.setattr(DiffusersAutoencoder, "moments", none)
    again = finetune(work, tmp_path / "again", "full", data=data, optim=optim)
    assert (first / "log.jsonl").read_text() == (again / "log.jsonl").read_text()
    with pytest.raises(AssertionError, match="encoded again"):
        finetune(work, tmp_path / "alone", "full", optim=optim)


def test_a_tenth_of_twenty_pictures_or_more_is_put_aside() -> None:
    assert [len(put_aside(n, None)) for n in (19, 20, 40, 1000)] == [0, 2, 4, 32]
    assert [len(put_aside(n, 0.5)) for n in (1, 4)] == [0, 2]
    assert put_aside(40, 0.0) == []
    assert put_aside(40, None) == put_aside(40, None) != [0, 1, 2, 3]


def test_a_lora_and_a_new_word_in_one_run_with_every_setting_of_the_style(
    work: Path, tmp_path: Path
) -> None:
    """Pivotal tuning; and the command that the run ends with draws with both."""
    settings: dict[str, Any] = {
        "inversion": {"tokens": ["<disc>"], "start_from": "red"},
        "data": {"instance_prompt": "red, big, <disc> style", "mask": "alpha", "flip": True},
        "captions": {
            "style": "<disc> style",
            "style_dropout": 0.2,
            "content_dropout": 0.3,
            "shuffle": True,
            "drop": 0.1,
        },
        "objective": {"huber": 0.1, "times_min": 0.2, "times_max": 0.9},
        "prior": {"prompts": ["a cat"], "count": 2, "steps": 2, "style": "old style"},
        "lora": {"rank": 2, "blocks": ["up_blocks", "mid_block"], "text_encoder": True},
        "text_lr": 0.05,
    }
    out = finetune(work, tmp_path / "out", "lora", **settings)
    (row,) = load_file(out / "learned_embeds.safetensors").values()
    table = weights(work / "model", "text_encoder")["text_model.embeddings.token_embedding.weight"]
    red = tower_of(tiny_bundle()).tokenizer.backend_tokenizer.encode("red").ids[1:-1]
    assert (row - table[red].mean(0)).abs().max() > 1e-2  # at its own rate
    names = load_file(out / "pytorch_lora_weights.safetensors")
    assert any("text_encoder" in name for name in names)
    assert not any("down_blocks" in name for name in names)
    card = (out / "README.md").read_text()
    assert f"--lora out --embedding out/{word_files(['<disc>'])[0]}" in card
    shutil.rmtree(checkpoints(out / "checkpoints")[0])
    finetune(work, out, "lora", **settings)
    (again,) = load_file(out / "learned_embeds.safetensors").values()
    assert torch.equal(row, again)


def test_the_text_encoder_may_have_a_rate_of_its_own(work: Path, tmp_path: Path) -> None:
    out = finetune(work, tmp_path / "out", "full", train_text=True, text_lr=1e-30)
    assert changed(work, out / "model", "unet")
    assert not changed(work, out / "model", "text_encoder")


def test_a_run_after_dry_ones_is_the_run_without_them(work: Path, tmp_path: Path) -> None:
    """Whatever they tried, before it began and in its middle."""
    settings = {"log_every": 3, "optim": {"warmup": 1}}
    plain = finetune(work, tmp_path / "plain", "lora", lora={"rank": 2}, **settings)
    out = finetune(work, tmp_path / "out", "lora", dry=True, lora={"rank": 3}, **settings)
    finetune(work, out, "lora", lora={"rank": 2}, **settings)
    shutil.rmtree(checkpoints(out / "checkpoints")[0])
    finetune(work, out, "lora", dry=True, lora={"rank": 2}, log_every=3, optim={"lr": 0.1})
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step-00000002"]
    finetune(work, out, "lora", lora={"rank": 2}, **settings)
    assert (plain / "log.jsonl").read_text() == (out / "log.jsonl").read_text()
    first, second = (
        load_file(folder / "pytorch_lora_weights.safetensors") for folder in (plain, out)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_lora_to_another_objective_leaves_a_model_that_has_it(work: Path, tmp_path: Path) -> None:
    objective = {"prediction": "x0", "process": "vp-cosine"}
    out = finetune(work, tmp_path / "out", "lora", objective=objective, lora={"rank": 2})
    moved, cosine = Bundle.load(out / "model"), processes.create("vp-cosine")
    assert moved.prediction == "x0"
    assert moved.process.log_snr(500) == pytest.approx(cosine.log_snr(500), abs=1e-4)
    assert changed(work, out / "model", "unet")
    assert "--model model" in (out / "model/README.md").read_text()


def test_full_changes_the_unet_alone_and_keeps_the_layout(work: Path, tmp_path: Path) -> None:
    objective = {"zero_terminal_snr": True}
    model = finetune(work, tmp_path / "out", "full", objective=objective) / "model"
    assert len(changed(work, model, "unet")) == len(weights(model, "unet"))
    assert not changed(work, model, "text_encoder")
    assert not changed(work, model, "vae")
    process = Bundle.load(model).process
    assert isinstance(process, DiscreteVP)
    assert process.betas[-1] == pytest.approx(1.0)


def test_full_with_the_text_encoder_and_buckets(work: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "wide"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(32, 32), (64, 32), (24, 48)] * 2):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(
            pictures / f"{number}.png"
        )
        (pictures / f"{number}.txt").write_text("a cat\na red cat\n")
    data = {"root": str(pictures), "buckets": True, "size": 32}
    model = finetune(work, tmp_path / "out", "full", data=data, train_text=True) / "model"
    assert changed(work, model, "unet")
    assert changed(work, model, "text_encoder")


def test_textual_inversion_learns_one_row_and_changes_nothing_else(
    work: Path, tmp_path: Path
) -> None:
    out = finetune(
        work,
        tmp_path / "out",
        "textual-inversion",
        data={"instance_prompt": "a <thing> disc"},
        inversion={"tokens": ["<thing>"], "start_from": "red"},
    )
    assert not changed(work, out / "model", "unet")
    table = "text_model.embeddings.token_embedding.weight"
    assert changed(work, out / "model", "text_encoder") == {table}
    before, after = (weights(m, "text_encoder")[table] for m in (work / "model", out / "model"))
    assert torch.equal(after[:-1], before)
    (row,) = load_file(out / "learned_embeds.safetensors").values()
    assert torch.equal(after[-1], row)
    red = tower_of(tiny_bundle()).tokenizer.backend_tokenizer.encode("red").ids[1:-1]
    assert 0 < (row - before[red].mean(0)).abs().max() < 0.1
    bundle = Bundle.load(out / "model")
    assert len(before) in tower_of(bundle).tokenize(["a <thing> disc"]).ids[0]


def test_a_new_inpainting_model_draws_as_before_and_then_learns_from_its_mask(
    work: Path, tmp_path: Path
) -> None:
    old = Bundle.load(work / "model")
    wide = with_mask_input(old)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    beside = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    states = tower_of(old).encode(["a red heart", "a cat"]).states
    t = torch.tensor([1.0, 900.0])
    with torch.no_grad():
        plain = old.network(x, t, Condition(states=states))
        masked = wide.network(x, t, Condition(states=states, beside=beside))
    assert (plain - masked).abs().max() < 1e-6

    data = {"crops": 2, "flip": True}
    model = finetune(work, tmp_path / "out", "full", data=data, inpaint=True) / "model"
    weight = weights(model, "unet")["conv_in.weight"]
    assert weight.shape[1] == 9
    assert weight[:, 4:].abs().amin(dim=(0, 2, 3)).min() > 0
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    picture = Image.open(work / "pictures/0.png")
    mask = Image.new("L", picture.size)
    mask.paste(255, (8, 8, 24, 24))
    edit = Inpaint(picture, mask)
    made = pipe("a red disc", edits=[edit], num_inference_steps=2, seed=0, progress=False)
    assert made.images[0].getpixel((2, 2)) == picture.getpixel((2, 2))


def test_masks_are_of_every_kind_and_functions_of_their_place() -> None:
    masks = torch.stack([draw_mask(3, 5, place, (32, 64)) for place in range(800)])
    assert masks.shape == (800, 1, 32, 64)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    shares = masks.mean(dim=(1, 2, 3))
    assert abs((shares == 1).float().mean() - WHOLE) < 0.05
    assert (shares > 0).all()
    assert ((shares > 0.05) & (shares < 0.6)).float().mean() > 0.4
    assert torch.equal(draw_mask(3, 5, 7, (32, 64)), masks[7])
    assert not torch.equal(draw_mask(3, 6, 7, (32, 64)), masks[7])


def test_masked_pictures_are_encoded_as_the_edit_does_it(work: Path) -> None:
    """Training shows the U-Net what the pipeline's `Inpaint` shows it later."""
    bundle = tiny_bundle()
    examples = read_folder(work / "pictures")[:2]
    holes = Holes(examples, [(16, 16)] * 2, [Variant(), Variant(flip=True)])
    beside = holes.beside(bundle, 1, 2, [4, 5], [(0, 0), (1, 1)])
    image = open_picture(examples[1].path).resize((16, 16), Image.Resampling.LANCZOS)
    mask = to_pil(draw_mask(1, 2, 5, (16, 16)).expand(3, -1, -1) * 2 - 1).convert("L")
    context = RunContext(16, 16, bundle.autoencoder)
    edit, _ = Inpaint(ImageOps.mirror(image), mask).bind(context)
    assert (edit.beside(beside[1:, 1:]) - beside[1:]).abs().max() < 1e-5


def test_prior_pictures_that_are_there_are_kept(work: Path, tmp_path: Path) -> None:
    settings = {
        "data": {"instance_prompt": "a sks disc"},
        "prior": {"steps": 2, "prompts": ["a disc", "a cat"], "count": 5},
    }
    out = finetune(work, tmp_path / "out", "dreambooth", **settings)
    drawn = sorted((out / "prior").rglob("*.png"))
    assert len(drawn) == 5
    bytes_before = [path.read_bytes() for path in drawn]
    assert len(set(bytes_before)) == 5
    shown = np.asarray(open_picture(out / "pictures/samples-00000000.png"))
    assert len({tile.tobytes() for tile in np.split(shown, 8, axis=1)}) == 8  # of one caption
    kept = drawn[0].stat().st_mtime_ns
    drawn[3].unlink()
    shutil.rmtree(out / "checkpoints")
    finetune(work, out, "dreambooth", **settings)
    assert [path.read_bytes() for path in drawn] == bytes_before
    assert drawn[0].stat().st_mtime_ns == kept


def test_prior_pictures_are_those_of_the_model_as_it_is(work: Path, tmp_path: Path) -> None:
    """Whatever objective it is moved to; and another seed has others."""
    prior = {"steps": 2, "prompts": ["a disc"], "count": 2}
    optim = {"steps": 1, "batch_size": 2}
    found: list[dict[str, bytes]] = []
    for name, changes in {
        "as it is": {},
        "moved": {"objective": {"prediction": "x0", "process": "vp-cosine"}},
        "seed": {"seed": 1},
    }.items():
        finetune(work, tmp_path / name, "full", prior=prior, optim=optim, **changes)
        folder = tmp_path / name / "prior"
        paths = sorted(folder.rglob("*.png"))
        found.append({str(path.relative_to(folder)): path.read_bytes() for path in paths})
    assert len(found[0]) == 2
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])


def test_pictures_to_inpaint_may_be_in_shards_and_go_mid_run(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = picture_folder(tmp_path / "pictures")
    write_shards(pictures, tmp_path / "shards", 6)
    settings = {"inpaint": True, "evaluate_every": 2}
    whole = finetune(work, tmp_path / "whole", "full", data={"root": str(pictures)}, **settings)
    optimize = Run.optimize

    def then_delete(self: Run, step: int, networks: Any) -> bool:
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
        return optimize(self, step, networks)

    monkeypatch.setattr(Run, "optimize", then_delete)
    shards = {"root": str(tmp_path / "shards/{00000..00001}.tar")}
    out = finetune(work, tmp_path / "out", "full", data=shards, **settings)
    first, again = (weights(o / "model", "unet") for o in (whole, out))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    grids = [(o / "pictures/samples-00000002.png").read_bytes() for o in (whole, out)]
    assert grids[0] == grids[1]


def test_pictures_and_cache_that_are_deleted_mid_run_change_nothing(
    work: Path, tmp_path: Path
) -> None:
    pictures = picture_folder(tmp_path / "pictures")
    settings = {"lora": {"rank": 2}, "data": {"root": str(pictures)}, "checkpoint_every": 1}
    whole = finetune(work, tmp_path / "whole", "lora", **settings)
    out = tmp_path / "out"
    gone: list[str] = []

    def delete() -> None:
        while not checkpoints(out / "checkpoints"):
            time.sleep(0.001)
        gone.append(checkpoints(out / "checkpoints")[0].name)
        shutil.rmtree(out / "cache")
        shutil.rmtree(pictures)

    deleting = threading.Thread(target=delete)
    deleting.start()
    finetune(work, out, "lora", **settings)
    deleting.join()
    assert gone[0] < "step-00000004"  # it was in the middle of the run
    first, again = (load_file(o / "pytorch_lora_weights.safetensors") for o in (whole, out))
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_a_run_that_goes_on_with_another_picture_says_so(
    work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pictures = picture_folder(tmp_path / "pictures")
    for steps, told in ((2, False), (3, False), (4, True)):
        if told:
            picture = next(pictures.glob("*.png"))
            ImageOps.invert(open_picture(picture)).save(picture)
        optim = {"steps": steps, "batch_size": 4}
        finetune(work, tmp_path / "out", "lora", data={"root": str(pictures)}, optim=optim)
        assert ("not the pictures and captions" in capfd.readouterr().out) == told


def test_prior_predictions_keep_what_prior_pictures_do_not(work: Path, tmp_path: Path) -> None:
    """The model is random, so its pictures are no data: learning them moves other prompts, while
    learning its predictions holds them."""
    old = Bundle.load(work / "model")
    states = tower_of(old).encode(["a cat", "a red heart"] * 4).states
    x = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(10, 990, 8).round()
    moved: dict[str, float] = {}
    for target in ("picture", "prediction"):
        prior = {"steps": 2, "count": 4, "prompts": ["a cat", "a red heart"], "target": target}
        optim = {"steps": 30, "batch_size": 4, "lr": 2e-3, "warmup": 0}
        out = finetune(work, tmp_path / target, "lora", prior=prior, optim=optim)
        new = LatentDiffusionPipeline.from_pretrained(work / "model")
        new.load_lora(out / "pytorch_lora_weights.safetensors")
        with torch.no_grad():
            before, after = (
                bundle.network(x, t, Condition(states=states)) for bundle in (old, new.bundle)
            )
        moved[target] = float((before - after).square().mean())
    assert moved["prediction"] < 0.5 * moved["picture"]


def test_half_of_all_draws_are_prior_ones_whose_loss_is_weighted() -> None:
    def some(count: int) -> Samples:
        return Samples([], [], [(8, 8)] * count, [], np.ones(count), torch.ones(count), count)

    both = some(40).joined(some(200), 0.5)
    drawn = [n for step in range(60) for n in both.order(0).batch(step, 8)]
    assert sum(n < 40 for n in drawn) == 240
    assert both.weights.tolist() == [1.0] * 40 + [0.5] * 200


def test_faulty_pictures_are_listed_and_left_out_and_long_captions_told(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = picture_folder(tmp_path / "pictures")
    (pictures / "3.png").write_bytes((pictures / "3.png").read_bytes()[:70])
    shutil.copy(pictures / "1.png", pictures / "7.png")
    (pictures / "5.png").unlink()
    data = {"root": str(pictures)}
    with pytest.raises(UserError, match=r"3 of 12 pictures \(2 broken, 1 duplicate\)"):
        finetune(work, tmp_path / "out", "lora", data=data)
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("3.png", "5.png", "7.png"))
    assert not (tmp_path / "out/cache").exists()
    long = "a disc " * 20
    data = {**data, "bad": "skip", "instance_prompt": long}
    out = finetune(work, tmp_path / "out", "lora", data=data)
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    told = capsys.readouterr().out
    assert f"1 captions are longer than the text encoder's window of {WINDOW}" in told
    assert f"the first: {long[:40]!r}" in told


def test_pictures_that_are_the_same_are_learned_once_and_keep_no_run_from_starting(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the folder of `latentdiff data emoji`, where six emoji look like six others."""
    pictures = picture_folder(tmp_path / "pictures")
    shutil.copy(pictures / "1.png", pictures / "8.png")
    data = {"root": str(pictures)}
    out = finetune(work, tmp_path / "out", "lora", data=data)
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    told = capsys.readouterr().out
    assert f"{pictures}/8.png is a duplicate of {pictures}/1.png" in told
    assert "11 pictures to learn from" in told


def test_a_run_is_named_by_its_folder_and_refuses_to_write_into_it(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = work / "pictures"
    link = tmp_path / "link"
    link.symlink_to(pictures)
    assert resolve({"data": {"root": str(link)}}, "test").out == Path("runs/link-lora")
    monkeypatch.chdir(pictures)
    with pytest.raises(UserError, match=r"out=runs/pictures-lora lies inside the data, \., "):
        resolve({"data": {"root": "."}}, "test")
    for out in (".", str(link / "deep/run")):
        with pytest.raises(UserError, match=r"name another with .*--out DIR"):
            resolve({"data": {"root": "."}, "out": out}, "test")
    assert resolve({"data": {"root": "."}, "out": "../pictures-lora"}, "test")


def test_prior_prompts_may_stand_in_a_file_wherever_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a disc\n\n a cat \n")
    prompts = [f"@{tmp_path}/prompts.txt", "a heart"]
    config = resolve({"data": {"root": "x"}, "prior": {"prompts": prompts}}, "test")
    assert config.prior.prompts == ["a disc", "a cat", "a heart"]


def test_what_a_model_knows_is_its_prior_unless_other_prompts_or_none_are_named(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = replace(tiny_bundle(), captions=("a red heart", "a cat")).save(tmp_path / "model")
    assert Bundle.load(model).captions == ("a red heart", "a cat")
    optim, prior = {"steps": 1, "batch_size": 2}, {"count": 3}
    own = finetune(work, tmp_path / "own", "full", model=str(model), optim=optim, prior=prior)
    assert "so that what" in (said := capsys.readouterr().out)
    assert f"{model} knows is kept: 2 captions of the model's own folder" in said
    assert "3 prior pictures drawn" in said
    assert (own / "model/captions.txt").read_text() == "a red heart\na cat\n"
    none = {"prompts": []}
    finetune(work, tmp_path / "none", "full", model=str(model), optim=optim, prior=none)
    assert "prior" not in capsys.readouterr().out
    finetune(work, tmp_path / "bare", "full", optim=optim)
    assert "--prior-prompt" in capsys.readouterr().out
    (model / "captions.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"captions.txt: not captions"):
        Bundle.load(model)


def test_the_preset_is_that_of_the_model_and_gives_way_to_all_that_is_named(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdxl = tiny_xl().save(tmp_path / "sdxl")
    named: dict[str, str] = {str(work / "model"): "emoji", str(sdxl): "sdxl"}
    for width, preset in ((768, "sd1"), (1024, "sd2")):
        monkeypatch.setattr(tiny, "WIDTH", width)
        named[str(tiny_bundle().save(tmp_path / preset))] = preset
    for model, preset in named.items():
        config = resolve({"model": model, "data": {"root": "x"}}, "test")
        assert config.preset == preset
        assert config.optim.lr == (2e-3 if preset == "emoji" else 1e-4)
        assert config.prior.count == (400 if preset == "emoji" else 200)
    values = {"preset": "sd1", "data": {"root": "x"}, "optim": {"steps": 7}, "prior": {"count": 9}}
    config = resolve(values, "test")
    assert (config.optim.steps, config.optim.lr, config.prior.count) == (7, 1e-4, 9)
    assert config.optim.batch_size == 4


def test_plain_captions_are_the_prior_of_stable_diffusion() -> None:
    captions, origin = prior_captions(tiny_bundle(), "sd1")
    assert len(set(captions)) == 200
    assert all(caption == caption.strip() and len(caption) > 8 for caption in captions)
    assert origin == "plain captions of all kinds"
    assert prior_captions(tiny_bundle(), "emoji") == ([], "")
    bundled = Bundle.load(None, device="cpu").captions
    assert len(set(bundled)) > 390
    assert {"a speedboat", "a stop sign"} <= {*bundled}


def test_a_run_without_pictures_says_so() -> None:
    with pytest.raises(UserError, match="--data DIR"):
        resolve({}, "finetune")


INVERSION = "--method textual-inversion --instance-prompt"
MISTAKES = {
    "--method dreambooth": "needs --instance-prompt",
    "--method controlnet --inpaint": "leaves the model as it is: leave out inpaint",
    "--method controlnet objective.prediction=x0": "leave out objective.process",
    "--method full control.kind=grey": "control is for --method controlnet",
    "--method controlnet control.kind=gray": "control.kind",
    "--method controlnet control.start=here control.attention=false": "has layers of its own",
    "--method textual-inversion": "--token",
    "--method textual-inversion --token <x>": "no caption holds <x>",
    f"{INVERSION} heart --token heart": "'heart' cannot be a new word: take one like <my-style>",
    f"{INVERSION} Heart --token Heart": "'Heart' cannot be a new word: take one like <my-style>",
    f"{INVERSION} <x> --token <x> --token <x>": "give each new word once",
    f"{INVERSION} <x><X> --token <x> --token <X>": "give each new word once",
    "--method full --token <x>": "textual-inversion",
    "objective.times_min=0.9 objective.times_max=0.1": "times_min must be below times_max",
    "captions.content_dropout=0.1": "need style",
    "captions.style=noir": "no caption is something followed by 'noir'",
    "data.mask=mask": "its field mask names no mask",
    "lora.kind=loha": "--layout kohya",
    "lora.kind=lokr --layout kohya lora.dropout=0.1": "a lokr has none of its inputs",
    "--prior-prompt @none.txt": "none.txt",
    "prior.prompts=['@none.txt']": "cannot read the prompts of none.txt",
    "objective.zap=1": "zap",
    "optim=3": "optim is a section",
    "--size 17": "multiple of 4",
    "--model nowhere/at/all": "nowhere",
    "optimizer=schedule-free optim.schedule=cosine": "leave optim.schedule",
    "optimizer=muon": "muon is for whole matrices",
    "optimizer=prodigy text_lr=1e-4 lora.text_encoder=true": "leave text_lr out",
    "text_lr=1e-4": "which this run does not train",
    "optimizer=adamw-8bit": "pip install 'latentdiff[8bit]'",
    "objective.zero_terminal_snr=true objective.prediction=eps": "objective.prediction=v",
    "objective.process=vp-linear-zsnr objective.prediction=score": "objective.prediction=v",
    "--inpaint": "--method full",
    "objective.prediction=x0 prior.target=prediction": "prior.target=picture",
    "preset=sd3": "preset: Input should be 'emoji'",
    "objective.min_snr_gamma=5 objective.prediction=score": "set it to null",
}


def test_without_the_extra_for_training_a_run_is_one_line(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not there
    for name in ("latentdiff.learning.records", "torch.utils.tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import_module("latentdiff.learning.records")
    with pytest.raises(UserError, match=r"pip install 'latentdiff\[train\]'"):
        finetune(work, tmp_path / "out", "lora")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_users_mistake_is_one_line(work: Path, tmp_path: Path, arguments: str) -> None:
    app = typer.Typer()
    app.command()(script("finetune").main)
    base = [
        "--data",
        str(work / "pictures"),
        "--model",
        str(work / "model"),
        "--out",
        str(tmp_path / "o"),
    ]
    done = CliRunner().invoke(app, [*base, *arguments.split(), "precision=no"])
    assert done.exit_code == 2, done.output
    line = done.stderr.rpartition("\r")[2]  # bars, which erase themselves, come before
    assert line.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert MISTAKES[arguments] in line


def test_a_control_network_learns_beside_a_model_that_stays(work: Path, tmp_path: Path) -> None:
    """It begins in silence; its run resumes exactly; diffusers opens it."""
    settings: dict[str, Any] = {
        "data": {"flip": True, "crops": 2},
        "control": {"embedding": [8, 8]},
        "evaluate_every": 2,
    }
    out = finetune(work, tmp_path / "out", "controlnet", **settings)
    folder = out / "controlnet"
    first = load_file(folder / "diffusion_pytorch_model.safetensors")
    theirs: Any = ControlNetModel.from_pretrained(folder)
    assert all(torch.equal(value, first[name]) for name, value in theirs.state_dict().items())
    base = weights(work / "model", "unet")
    begun = {name for name, value in first.items() if name in base}
    assert any(not torch.equal(first[name], base[name]) for name in begun)
    assert all(first[name].any() for name in first if name.startswith("controlnet_"))
    assert not (out / "model").exists()

    pipe = LatentDiffusionPipeline.from_pretrained(work / "model")
    edges = control_picture(open_picture(work / "pictures/0.png").resize((16, 16)), "canny")
    call: dict[str, Any] = {"num_inference_steps": 20, "seed": 0, "progress": False}
    plain = pipe("a red disc", output_type="pt", **call).images
    told = pipe("a red disc", controls=[Control(folder, edges)], output_type="pt", **call).images
    assert (plain - told).abs().max() > 1e-3
    grids = [open_picture(out / f"pictures/samples-0000000{step}.png") for step in (0, 4)]
    shown = [np.asarray(grid)[:, 16:32] for grid in grids]
    assert np.array_equal(np.asarray(grids[0])[:, :16], np.asarray(grids[1])[:, :16])
    silent = np.asarray(pipe("a red disc", **call).images[0])  # what the model draws by itself
    assert np.abs(shown[0].astype(int) - silent.astype(int)).max() <= 1
    assert np.abs(shown[0].astype(int) - shown[1].astype(int)).max() > 1
    assert (
        "--control controlnet:photo.png --control-from canny --model"
        in (folder / "README.md").read_text()
    )

    shutil.rmtree(checkpoints(out / "checkpoints")[0])
    shutil.rmtree(folder)
    finetune(work, out, "controlnet", **settings)
    again = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())

    goes_on = {**settings, "control": {"start": str(folder)}}
    finetune(work, tmp_path / "on", "controlnet", **goes_on)
    begins = open_picture(tmp_path / "on/pictures/samples-00000000.png")
    assert np.array_equal(np.asarray(begins), np.asarray(grids[1]))

    saved = {**goes_on, "control": {"start": str(folder), "strength": 2.5}}
    finetune(work, tmp_path / "strong", "controlnet", **saved)
    ends = [
        load_file(tmp_path / name / "controlnet/diffusion_pytorch_model.safetensors")
        for name in ("on", "strong")
    ]
    for name, value in ends[0].items():
        said = name.startswith(("controlnet_down_blocks", "controlnet_mid_block"))
        assert torch.equal(ends[1][name], 2.5 * value if said else value), name


def test_control_pictures_of_a_field_are_cut_as_their_pictures_are(tmp_path: Path) -> None:
    """In every crop and flip; none from outside the folder."""
    folder = picture_folder(tmp_path / "pictures")
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 32, 3), dtype=np.uint8))
    wide.save(folder / "0.png")
    wide.convert("L").save(folder / "depth.png")
    wide.save(tmp_path / "outside.png")
    lines = ['{"file_name": "0.png", "text": "a cat", "depth": "depth.png"}']
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    examples, cuts = read_folder(folder)[:1], variants(2, True)
    told = ControlConfig(field="depth")
    pictures = ControlPictures(examples, [(16, 16)], cuts, told, folder)
    for number, cut in enumerate(cuts):
        wanted = to_uint8(cut.fill(wide.convert("L").convert("RGB"), (16, 16))).float() / 255
        assert torch.equal(pictures.of([(0, number)])[0], wanted)
    assert pictures.shown(0).size == (16, 16)
    for name, said in (("../outside.png", "lies outside"), ("", "names no control picture")):
        other = [replace(examples[0], fields={**examples[0].fields, "depth": name})]
        with pytest.raises(UserError, match=said):
            ControlPictures(other, [(16, 16)], cuts, told, folder)

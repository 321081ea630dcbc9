"""Every method of distillation on twelve pictures and a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import picture_folder, script
from tiny import tiny_bundle

from latentdiff.bundle import Bundle
from latentdiff.diffusion import process as processes
from latentdiff.errors import UserError
from latentdiff.learning.checkpoint import checkpoints
from latentdiff.learning.config import validate
from latentdiff.pipeline import LatentDiffusionPipeline

BASE = {
    "optim": {"steps": 4, "batch_size": 4, "lr": 1e-3, "warmup": 0, "ema_decay": 0.5},
    "log_every": 1,
    "checkpoint_every": 2,
    "save_dtype": "float32",
    "sample_prompts": ["a red disc"],
}
METHODS = {
    "guided": {"method": "guided"},
    "progressive": {"method": "progressive", "teacher_steps": 8, "steps": 2},
    "consistency": {"method": "consistency", "teacher_steps": 10, "teacher_solver": "heun"},
    "consistency-training": {"method": "consistency-training", "teacher_steps": 10},
    "lora": {"method": "consistency", "guidance": [4, 4], "lora": 2, "save_dtype": "float16"},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pictures`, and `model`, a tiny bundle as a folder."""
    folder = tmp_path_factory.mktemp("distill")
    picture_folder(folder / "pictures")
    tiny_bundle().save(folder / "model")
    return folder


def distill(work: Path, out: Path, **settings: object) -> Path:
    """One run in this process."""
    module = script("distill")
    data = {"root": str(work / "pictures"), "size": 32, "held_out_fraction": 0.0}
    values = {**BASE, "out": str(out), "model": str(work / "model"), "data": data, **settings}
    module.train(validate(module.DistillConfig, values, "test"), False)
    return out


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_goes_on_ends_in_the_same_student(work: Path, tmp_path: Path, name: str) -> None:
    """From the save in the middle; there, progressive distillation has changed its teacher."""
    out = distill(work, tmp_path / "out", **METHODS[name])
    file = (
        out / "pytorch_lora_weights.safetensors"
        if name == "lora"
        else out / "model/unet/diffusion_pytorch_model.safetensors"
    )
    whole = load_file(file)
    newest = checkpoints(out / "checkpoints")[0]
    shutil.rmtree(newest)
    file.unlink()
    if name != "lora":
        shutil.rmtree(out / "model")
    distill(work, tmp_path / "out", **METHODS[name])
    again = load_file(file)
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    wanted = METHODS[name].get("save_dtype", BASE["save_dtype"])
    assert {value.dtype for value in whole.values()} == {getattr(torch, wanted)}


def test_a_student_begins_as_its_teacher(work: Path, tmp_path: Path) -> None:
    """Unguided, its first answers are the teacher's own; guided they are not."""
    same = distill(work, tmp_path / "same", method="guided", guidance=[1, 1])
    assert losses(same)[0] < 1e-10
    other = distill(work, tmp_path / "other", method="guided", guidance=[4, 4])
    assert losses(other)[0] > 1e-3


def test_one_call_learns_what_two_say(work: Path, tmp_path: Path) -> None:
    optim = {**BASE["optim"], "steps": 60, "lr": 3e-3}
    out = distill(
        work, tmp_path / "out", method="guided", guidance=[4, 4], optim=optim, checkpoint_every=60
    )
    found = losses(out)
    assert sum(found[-10:]) < 0.6 * sum(found[:10])


def test_the_student_draws_in_one_call_a_step_and_hears_its_scale(
    work: Path, tmp_path: Path
) -> None:
    out = distill(work, tmp_path / "out", **METHODS["consistency"])
    bundle = Bundle.load(out / "model")
    assert (bundle.solver, bundle.steps.teacher_steps) == ("lcm", 10)
    scheduler = json.loads((out / "model/scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "LCMScheduler"
    calls: list[int] = []
    bundle.network.module.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    pipe = LatentDiffusionPipeline(bundle)
    drawn = [
        pipe(
            "a red disc",
            num_inference_steps=4,
            guidance_scale=scale,
            seed=0,
            output_type="pt",
            progress=False,
        ).images
        for scale in (2.0, 6.0)
    ]
    assert calls == [1] * 8
    assert (drawn[0] - drawn[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lora": 2}, "a LoRA cannot be told a scale"),
        ({"guidance": [4, 2]}, "the lower scale comes first"),
        ({"method": "progressive", "teacher_steps": 24, "steps": 4}, "does not halve to 4 steps"),
        ({**METHODS["lora"], **METHODS["progressive"]}, "trains all weights"),
        ({"teacher_steps": 5000}, "fewer than 5000"),
        ({"data": {"root": "pictures", "size": 30}}, "is no multiple of 4"),
    ],
)
def test_what_does_not_fit_is_one_line(
    work: Path, tmp_path: Path, settings: dict[str, object], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        distill(work, tmp_path / "out", **settings)


def test_heun_does_not_begin_at_pure_noise(work: Path, tmp_path: Path) -> None:
    endless = tiny_bundle(process=processes.create("vp-scaled-linear-zsnr"), prediction="v")
    endless.save(tmp_path / "model")
    with pytest.raises(UserError, match="heun cannot begin at pure noise"):
        distill(work, tmp_path / "out", model=str(tmp_path / "model"), teacher_solver="heun")

"""A run on a bad day: no disk, no picture, NaN, another run. One line, and nothing is lost."""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import Encoder as DiffusersEncoder
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from lab import Lab
from lab import train as run_stage
from PIL import Image
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from latentdiff.errors import UserError
from latentdiff.learning.checkpoint import checkpoints, find_fault, load_newest
from latentdiff.learning.run import Run
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.models.kl_autoencoder import Encoder
from latentdiff.pictures import open_picture

UNETS = UNet2DConditionModel, CrossAttentionUNet  # that stage 2 trains, and that a model opens as
ENCODERS = DiffusersEncoder, Encoder


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Pictures, stage 1 and a LoRA trained for one step, and stage 2 for four."""
    lab = Lab(tmp_path_factory.mktemp("faults"))
    train(lab, "autoencoder", "first", "optim.steps=1")
    (lab.folder / "vae").symlink_to(lab.folder / "first/vae")
    train(lab, "diffusion", "whole")
    (lab.folder / "model").symlink_to(lab.folder / "whole/model")
    train(lab, "finetune", "lora", "optim.steps=1")
    return lab


def train(lab: Lab, stage: str, out: str, *overrides: str) -> None:
    where = [f"out={lab.folder / out}", f"data.root={lab.folder}/pictures", "optim.steps=4"]
    where += ["precision=no"]
    run_stage(stage, lab.folder / f"{stage}.yaml", *where, *overrides)


def steps_of(run: Path) -> list[str]:
    found = checkpoints(run / "checkpoints")
    assert not any(find_fault(folder) for folder in found)
    return [folder.name.lstrip("step-0") for folder in found]


def assert_equal(one: Path, other: Path) -> None:
    """The last checkpoint, with averages and optimizer, and every loss."""
    sums, states = [], []
    for run in (one, other):
        newest = checkpoints(run / "checkpoints")[0]
        found = json.loads((newest / "manifest.json").read_text())["sha256"]
        sums.append({name: sum for name, sum in found.items() if name != "state.json"})
        states.append(json.loads((newest / "state.json").read_text()))
        del states[-1]["settings"]["data.root"]
    assert sums[0] == sums[1]
    assert states[0] == states[1]
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()


def files_no_larger_than(size: int) -> None:
    """The kernel refuses every write beyond that, in the middle of it, as a full disk does."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))


@contextmanager
def room_again_afterwards() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Have `act()` called once the optimizer has taken step number `step`, counted from 1."""
    optimize, taken = Run.optimize, 0

    def acted(self: Run, number: int, networks: Any) -> bool:
        nonlocal taken
        done = optimize(self, number, networks)
        taken += 1
        if taken == step:
            act()
        return done

    monkeypatch.setattr(Run, "optimize", acted)


def test_a_full_disk_ends_a_run_in_one_line_and_room_lets_it_go_on(lab: Lab) -> None:
    out = lab.folder / "full"
    with pytest.MonkeyPatch.context() as patch, room_again_afterwards():
        # more than the log and less than the weights
        after_step(patch, 3, lambda: files_no_larger_than(30_000))
        with pytest.raises(UserError, match=r"cannot write .*full") as error:
            train(lab, "diffusion", "full")
    assert "\n" not in str(error.value)
    assert steps_of(out) == ["2", "1"]
    train(lab, "diffusion", "full")
    assert_equal(lab.folder / "whole", out)


def test_a_full_disk_at_the_end_of_stage_1_leaves_no_half_of_an_autoencoder(lab: Lab) -> None:
    with pytest.MonkeyPatch.context() as patch, room_again_afterwards():
        save = Run.save

        def last(self: Run, *arguments: Any) -> None:
            save(self, *arguments)
            files_no_larger_than(30_000)

        patch.setattr(Run, "save", last)
        with pytest.raises(UserError, match=r"cannot write .*vae") as error:
            train(lab, "autoencoder", "full-1", "optim.steps=1")
    assert "\n" not in str(error.value)
    assert not list((lab.folder / "full-1").glob("*vae*"))
    train(lab, "autoencoder", "full-1", "optim.steps=1")
    assert (lab.folder / "full-1/vae/config.json").is_file()


def test_a_folder_that_cannot_be_written_is_one_line(lab: Lab) -> None:
    with pytest.raises(UserError, match=r"cannot write to /proc/mine"):  # also for root
        train(lab, "diffusion", "/proc/mine")


def test_one_run_at_a_time_in_a_folder_and_death_frees_it(lab: Lab) -> None:
    out = lab.folder / "locked"
    shutil.copytree(lab.folder / "whole/checkpoints", out / "checkpoints")
    rests = [f".model.{'0a' * 8}.part", f".config.yaml.{'1b' * 8}.part"]
    others = [".model.mine.part", f"model.{'0a' * 8}.part"]
    for name in (*rests, *others):  # as kills leave them in the middle of writing, and others'
        shutil.copytree(lab.folder / "whole/model", out / name / "model")
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import fcntl, sys, time; file = open(sys.argv[1], 'w')\n"
            "fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); time.sleep(600)",
            str(out / ".lock"),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(UserError, match="another run"):
        train(lab, "diffusion", "locked")
    assert not (out / "config.yaml").exists()
    assert {path.name for path in out.iterdir()} >= {*rests, *others}
    holder.kill()
    holder.communicate()
    train(lab, "diffusion", "locked")
    assert (out / "model/model_index.json").is_file()
    assert {path.name for path in out.iterdir()} & {*rests, *others} == set(others)


@pytest.mark.parametrize("where", ["data", "loss", "gradient"])
def test_a_step_with_nan_is_skipped_and_counted(lab: Lab, where: str) -> None:
    """The third of four steps: the weights stay as they were, and the run goes on."""
    calls = 0

    def spoil(module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> None:
        nonlocal calls
        if not isinstance(module, UNETS) or not torch.is_grad_enabled():
            return
        calls += 1
        if calls == 3 and where == "data":
            inputs[0][0, 0, 0, 0] = torch.nan
        elif calls == 3 and where == "loss":
            output.data[0] = torch.inf
        elif calls == 3:
            output.register_hook(lambda gradient: gradient * torch.nan)

    before = where == "data"
    hooks = nn.modules.module
    add = hooks.register_module_forward_pre_hook if before else hooks.register_module_forward_hook
    handle = add(spoil)
    try:
        train(lab, "diffusion", f"nan-{where}", "keep_checkpoints=9")
    finally:
        handle.remove()
    root = lab.folder / f"nan-{where}" / "checkpoints"
    states = [json.loads((path / "state.json").read_text()) for path in checkpoints(root)[::-1]]
    assert [state["bad_steps"] for state in states] == [0, 0, 1, 1]
    second, third, fourth = (
        (root / f"step-0000000{step}/model.safetensors").read_bytes() for step in (2, 3, 4)
    )
    assert second == third != fourth
    rows = (lab.folder / f"nan-{where}/log.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
    assert (losses[2] is None) == (where != "gradient")
    assert None not in (losses[0], losses[1], losses[3])


def pictures_of(run: Path) -> dict[str, Image.Image]:
    return {str(path.relative_to(run)): open_picture(path) for path in run.rglob("*.png")}


@pytest.mark.parametrize("stage", ["diffusion", pytest.param("finetune", marks=pytest.mark.slow)])
def test_pictures_are_drawn_fewer_at_once_where_memory_is_short(lab: Lab, stage: str) -> None:
    more = ["optim.steps=1", "sample_prompts=[a red disc, a blue disc, a disc]"]
    if stage == "finetune":
        more += ["prior.prompts=[a disc]", "prior.count=5", "prior.steps=2", "prior.target=picture"]
    train(lab, stage, f"{stage}-room", *more)

    def refuse(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        drawn = isinstance(module, UNETS) and not torch.is_grad_enabled()
        if drawn and len(inputs[0]) > 2:  # of guidance, so one picture
            raise torch.OutOfMemoryError("no room")

    handle = nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        train(lab, stage, f"{stage}-no-room", *more)
    finally:
        handle.remove()
    roomy, short = (pictures_of(lab.folder / f"{stage}{room}") for room in ("-room", "-no-room"))
    assert len(roomy) == {"diffusion": 2, "finetune": 10}[stage]
    assert short.keys() == roomy.keys()
    for name, picture in roomy.items():
        gap = np.asarray(picture, int) - np.asarray(short[name], int)
        assert np.abs(gap).max() <= 1, name


def test_what_memory_made_smaller_is_kept_and_what_was_set_so_is_not(lab: Lab) -> None:
    seen: list[int] = []
    room = 4

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, UNETS) and torch.is_grad_enabled():
            seen.append(len(inputs[0]))
            if len(inputs[0]) > room:
                raise torch.OutOfMemoryError("no room")

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        train(lab, "diffusion", "set", "optim.steps=1", "optim.accumulation=4")
        room = 2
        train(lab, "diffusion", "set", "optim.steps=2", "optim.accumulation=1")
        room = 4
        train(lab, "diffusion", "set", "optim.steps=3", "optim.accumulation=4")
        train(lab, "diffusion", "set", "optim.steps=4", "optim.accumulation=1")
    finally:
        handle.remove()
    assert seen == [1, 1, 1, 1, 4, 2, 2, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("where", ["drawing", "encoding", "optimizer"])
def test_no_memory_where_nothing_can_shrink_is_one_line(lab: Lab, where: str) -> None:
    def refuse(module: object, *arguments: Any) -> None:
        drawn = isinstance(module, UNETS) and not torch.is_grad_enabled()
        encoded = isinstance(module, ENCODERS)
        if {"drawing": drawn, "encoding": encoded, "optimizer": True}[where]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: no room")

    if where == "optimizer":
        handle = register_optimizer_step_pre_hook(refuse)
    else:
        handle = nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        with pytest.raises(UserError, match=r"^out of memory, where no smaller batch") as error:
            train(lab, "finetune", f"no-room-{where}", "sample_prompts=[a disc, a disc]")
    finally:
        handle.remove()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_stage_1_names_a_picture_that_is_gone_and_goes_on_when_it_is_back(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    pictures, aside = lab.folder / "pictures", lab.folder / "aside"
    reference = lab.folder / "stage-1"
    if not reference.exists():
        train(lab, "autoencoder", "stage-1")
    with monkeypatch.context() as patch:

        def hide() -> None:
            aside.mkdir()
            for path in pictures.glob("*.png"):
                path.rename(aside / path.name)

        after_step(patch, 1, hide)
        out = f"gone-{workers}"
        with pytest.raises(UserError, match=r"pictures/\d+\.png") as error:
            train(lab, "autoencoder", out, f"data.workers={workers}", "optim.steps=50")
    assert "\n" not in str(error.value)
    for path in aside.iterdir():
        path.rename(pictures / path.name)
    aside.rmdir()
    assert int(steps_of(lab.folder / out)[0]) >= 1
    if workers == 0:
        train(lab, "autoencoder", out)
        assert_equal(reference, lab.folder / out)


def test_stage_2_has_its_latents_and_needs_no_picture(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = lab.folder / "copied"
    shutil.copytree(lab.folder / "pictures", copied)
    after_step(monkeypatch, 1, lambda: [path.unlink() for path in copied.glob("*.png")])
    train(lab, "diffusion", "latents", f"data.root={copied}")
    assert_equal(lab.folder / "whole", lab.folder / "latents")


def test_a_run_goes_on_as_the_run_that_it_was_or_says_so(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other shapes are refused in one line; so is all that a finished run was not trained with."""
    log = {
        out: (lab.folder / out / "config.yaml").read_text() for out in ("first", "whole", "lora")
    }
    refused = {
        ("finetune", "lora", "lora.rank=3"): "lora.rank=2, not 3",
        ("finetune", "lora", "lora.targets=attention"): "lora.targets=all, not attention",
        ("finetune", "lora", "method=full"): "method=lora, not full",
        (
            "autoencoder",
            "first",
            "model.channels=[8,16]",
        ): r"model.channels=\[8, 8\], not \[8, 16\]",
        ("diffusion", "whole", "text.width=64"): "text.width=32, not 64",
        ("diffusion", "whole", "unet.channels=[64,96]"): r"unet.channels=\[64, 64\]",
        ("diffusion", "whole", "optim.lr=0.5"): "finished, and was trained with optim.lr=0.001",
        ("diffusion", "whole", "optim.steps=3"): "trained for 4 steps, more than optim.steps=3",
    }
    for (stage, out, change), line in refused.items():
        steps = {"autoencoder": 1, "finetune": 1, "diffusion": 4}[stage]
        with pytest.raises(UserError, match=line) as error:
            train(lab, stage, out, f"optim.steps={steps}", change)
        assert "name another out" in str(error.value)
        assert "\n" not in str(error.value)
        assert (lab.folder / out / "config.yaml").read_text() == log[out]  # nothing was done
    with pytest.raises(UserError, match=r"loss.adversarial does not go with precision fp16"):
        train(lab, "autoencoder", "half", "precision=fp16")

    out = lab.folder / "longer"
    shutil.copytree(lab.folder / "whole", out)
    train(lab, "diffusion", "longer", "checkpoint_every=7", "sample_prompts=[a blue disc]")
    train(
        lab, "diffusion", "longer", "optim.steps=5", "optim.lr=0.01", f"vae={lab.folder}/first/vae"
    )
    said = capsys.readouterr().out
    assert "at step 4, from here on with optim.lr=0.01 instead of 0.001\n" in said
    newest = checkpoints(out / "checkpoints")[0]
    state = json.loads((newest / "state.json").read_text())
    del state["settings"]  # as checkpoints of before have none
    (newest / "state.json").write_text(json.dumps(state))
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in newest.iterdir()}
    del sums["manifest.json"]
    own = hashlib.sha256(json.dumps(sums, indent=1).encode()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps({"sha256": sums, "own": own}, indent=1))
    train(lab, "diffusion", "longer", "optim.steps=6", "optim.lr=0.02")
    assert steps_of(out)[0] == "6"


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion", "finetune"])
def test_a_resumed_run_does_not_hold_its_checkpoint(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    held: list[weakref.ref[Tensor]] = []

    def noted(*where: Any) -> Any:
        found = load_newest(*where)
        assert found is not None
        held.extend(weakref.ref(tensor) for tensor in found[0]["ema"].values())
        return found

    out = {"autoencoder": "first", "diffusion": "whole", "finetune": "lora"}[stage]
    copied = f"held-{stage}"
    shutil.copytree(lab.folder / out, lab.folder / copied)
    monkeypatch.setattr("latentdiff.learning.run.load_newest", noted)
    alive: list[int] = []
    after_step(monkeypatch, 1, lambda: alive.append(sum(ref() is not None for ref in held)))
    train(lab, stage, copied, "optim.steps=5")
    assert len(held) > 10
    assert alive == [0]

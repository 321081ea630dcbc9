"""Launch the training scripts by `accelerate launch`, with the committed Accelerate configs."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal, TextIO

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from lab import SCRIPTS, Lab
from scripts import ROOT, picture_folder
from tiny import tiny_bundle

from latentdiff.errors import UserError
from latentdiff.learning.checkpoint import checkpoints, find_fault
from latentdiff.learning.config import OptimConfig, RunConfig
from latentdiff.learning.launch import crowded, spreads_over_cpus
from latentdiff.learning.run import Run

CONFIGS = sorted((ROOT / "training/configs").glob("accelerate-*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_config(path: Path) -> None:
    config = load_config_from_file(str(path))  # an unknown key is an error
    assert config.distributed_type == ("FSDP" if "fsdp" in path.stem else "MULTI_GPU")
    assert config.use_cpu == (path.stem == "accelerate-cpu")
    assert config.mixed_precision == "no"  # the run's own `precision` decides


def test_other_work_on_the_processors_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 9.0, 9.0))
    assert crowded() is None
    monkeypatch.setattr(os, "getloadavg", lambda: (9.1, 0.0, 0.0))
    line = crowded()
    assert line is not None
    assert line.startswith("other work holds the processors (load 9.1 on 2)")


@pytest.mark.parametrize("library", ["DEEPSPEED", "MEGATRON_LM"])
def test_a_launch_that_no_run_can_follow_is_one_line(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{library}", "true")
    with pytest.raises(UserError, match=r"by (DeepSpeed|Megatron-LM): launch with .*ddp\.yaml"):
        Run(RunConfig(out=tmp_path / "out", optim=OptimConfig(steps=1)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("launched", "own", "told"),
    [("fp16", "no", True), ("bf16", "no", True), ("no", "bf16", False), ("bf16", "bf16", False)],
)
def test_the_launchers_precision_does_not_count_and_that_is_said(
    launched: str,
    own: Literal["no", "bf16"],
    told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    AcceleratorState._reset_state(True)
    run = Run(RunConfig(out=tmp_path / "out", precision=own, optim=OptimConfig(steps=1)))
    assert run.accelerator.mixed_precision == own
    AcceleratorState._reset_state(True)
    assert (
        f"precision={launched} in the run's own settings does" in capsys.readouterr().out
    ) == told


@pytest.mark.parametrize(
    ("world", "kind", "over_cpus"),
    [("2", None, True), ("2", "mps", True), ("2", "cuda", False), ("1", None, False)],
)
def test_processes_without_gpus_to_share_are_one_run(
    world: str, kind: str | None, over_cpus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts them; a slow test below launches two."""
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    device = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    assert spreads_over_cpus() == over_cpus
    monkeypatch.delenv("LOCAL_RANK")
    assert not spreads_over_cpus()


def taken(lock: TextIO) -> bool:
    """Tell whether nobody had the lock."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_sigterm_to_the_launcher_saves_and_ends_its_run(tmp_path: Path) -> None:
    picture_folder(tmp_path / "pictures")
    tiny_bundle().save(tmp_path / "model")
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu"),
        *(str(ROOT / "training/finetune.py"), "--data", str(tmp_path / "pictures")),
        *("--model", str(tmp_path / "model"), "--out", str(out), "--steps", "100000"),
        *("--batch-size", "2", "precision=no", "lora.rank=2", "checkpoint_every=99999"),
        "log_every=1",
    ]
    launcher = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "log.jsonl").exists():
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        launcher.terminate()
        assert launcher.wait() == -signal.SIGTERM
        with (out / ".lock").open("w") as lock:
            while not taken(lock):
                assert time.monotonic() < deadline, "the run goes on without its launcher"
                time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    (saved,) = checkpoints(out / "checkpoints")
    assert find_fault(saved) is None


@pytest.mark.slow
def test_two_launched_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    Lab(tmp_path)
    more = {"autoencoder": [], "diffusion": [f"vae={tmp_path}/autoencoder-one/vae"]}
    losses: dict[str, list[float]] = {}
    for stage in more:
        where = [f"data.root={tmp_path}/pictures", "optim.steps=4", "loss.adversarial=0"]
        overrides = [*where[: 3 if stage == "autoencoder" else 2], *more[stage]]
        path = tmp_path / f"{stage}.yaml"
        module = SCRIPTS[stage]
        kind = module.AutoencoderConfig if stage == "autoencoder" else module.DiffusionConfig
        one = [f"out={tmp_path}/{stage}-one", *overrides]
        module.train(module.load_config(kind, path, one), False)
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file"),
            *(str(ROOT / "training/configs/accelerate-cpu.yaml"), "--main_process_port", "0"),
            *(str(ROOT / f"training/{stage}.py"), "--config", str(path)),
            *(f"out={tmp_path}/{stage}-two", *overrides),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        for count in ("one", "two"):
            rows = (tmp_path / f"{stage}-{count}/log.jsonl").read_text().splitlines()
            losses[count] = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
        assert len(losses["two"]) == len(losses["one"]) == 4
        gaps = [abs(a - b) for a, b in zip(losses["one"], losses["two"], strict=True)]
        assert max(gaps) < 1e-6, (stage, gaps)

"""The committed Accelerate configs, read by Accelerate and launched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from lab import SCRIPTS, Lab
from scripts import ROOT

CONFIGS = sorted((ROOT / "training/configs").glob("accelerate-*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_config(path: Path) -> None:
    config = load_config_from_file(str(path))  # an unknown key is an error
    assert config.distributed_type == ("FSDP" if "fsdp" in path.stem else "MULTI_GPU")
    assert config.use_cpu == (path.stem == "accelerate-cpu")
    assert config.mixed_precision == "no"  # the run's own `precision` decides


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
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        for count in ("one", "two"):
            rows = (tmp_path / f"{stage}-{count}/log.jsonl").read_text().splitlines()
            losses[count] = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
        assert len(losses["two"]) == len(losses["one"]) == 4
        gaps = [abs(a - b) for a, b in zip(losses["one"], losses["two"], strict=True)]
        assert max(gaps) < 1e-6, (stage, gaps)

"""Runs killed, stopped, short of memory and shared out: each is the run left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT


def alone(script: str, *arguments: str) -> str:
    """Output of a script here, in a process of its own: it forks, which a runner must not."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | threads | {"PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("kills", "stages"),
    [
        (2, ["diffusion", "finetune"]),
        pytest.param(6, ["autoencoder", "diffusion", "finetune"], marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_again_and_again_is_the_run_left_alone(kills: int, stages: list[str]) -> None:
    """So many times in each stage, half of them inside a save."""
    inside, outside = kills // 2, kills // 2
    said = alone("kills.py", "--kills", str(len(stages) * kills), "--stages", *stages)
    for stage in stages:
        places = f"{{'inside a save': {inside}, 'from outside': {outside}}}"
        assert f"{stage}: {places}: equal to the run left alone" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["distill", "denoising_gan", "energy", "joint"])
def test_a_further_objective_killed_again_and_again_is_the_one_left_alone(stage: str) -> None:
    said = alone("kills.py", "--kills", "20", "--every-step", "--stages", stage)
    assert f"{stage}: {{'inside a save': 10, 'from outside': 10}}: equal" in said, said
    assert said.count("equal at every stop") == 2


@pytest.mark.slow
def test_a_run_stopped_after_every_step_is_the_run_left_alone() -> None:
    stages = ("autoencoder", "diffusion", "finetune")
    said = alone(
        *("kills.py", "--kills", "100", "--every-step", "--seed", "1", "--stages", *stages)
    )
    assert said.count("equal at every stop") == 8


def assert_same_losses(*arguments: str) -> None:
    """Losses to 1e-6 and the learning rate exactly, over 20 steps of a global batch of 8."""
    for script, runs in json.loads(alone("processes.py", *arguments)).items():
        one = runs.pop("one")
        assert len(one) == 20
        assert max(loss for loss, _ in one) - min(loss for loss, _ in one) > 0.01  # they differ
        for name, other in runs.items():
            assert [rate for _, rate in other] == [rate for _, rate in one], (script, name)
            gaps = [abs(a - b) for (a, _), (b, _) in zip(one, other, strict=True)]
            assert max(gaps) < 1e-6, (script, name, max(gaps))


def test_two_processes_and_too_little_memory_give_the_losses_of_one_with_enough() -> None:
    assert_same_losses()


@pytest.mark.slow
def test_processes_agree_when_one_of_them_is_out_of_memory() -> None:
    assert_same_losses("--all")

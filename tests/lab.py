"""Training runs as forks of one process that has imported everything: seconds instead of minutes.

Not for the process of a test runner, which has threads: training/kills.py and processes.py use it.
"""

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scripts import picture_folder, script

from latentdiff.learning.run import Run

STAGES = {
    "autoencoder": "AutoencoderConfig",
    "diffusion": "DiffusionConfig",
    "finetune": "FinetuneConfig",
    "distill": "DistillConfig",
    "denoising_gan": "GanConfig",
    "energy": "EnergyConfig",
    "joint": "JointConfig",
}
NEEDS = {
    "diffusion": "vae",
    **dict.fromkeys(("finetune", "distill", "denoising_gan", "energy", "joint"), "model"),
}
"""What a stage starts from: the result of stage 1 or of stage 2, by its name in a config."""
SCRIPTS = {stage: script(stage) for stage in STAGES}
STEPS = 8  # three epochs of stage 1's ten pictures would be 7.5
OPTIM = {"lr": 1e-3, "steps": STEPS, "warmup": 2, "batch_size": 4}
CONFIGS: dict[str, dict[str, object]] = {
    "autoencoder": {
        "data": {"size": 32, "balance": ["base"], "held_out_fraction": 0.2},
        "model": {"channels": [8, 8], "latent_channels": 4, "norm_groups": 4},
        "loss": {"adversarial": 0.1, "adversarial_start": 0.5},
    },
    "diffusion": {
        "data": {"size": 16, "held_out_fraction": 0.0},
        "unet": {"channels": [64, 64], "attention": [True, False], "head_dim": 16},
        "text": {"vocabulary": 540, "window": 8, "width": 32, "layers": 1, "heads": 2},
        "sample_prompts": ["a red disc"],
    },
    "finetune": {
        "method": "lora",
        "data": {"size": 16, "flip": True},
        "lora": {"rank": 2, "text_encoder": True},
        "held_out": {"fraction": 0.2, "every": 2, "keep": "best"},
        "sample_prompts": ["a red disc"],
    },
    "denoising_gan": {
        "steps": 2,
        "noise": 4,
        "width": 16,
        "penalty_every": 3,
        "data": {"size": 16, "held_out_fraction": 0.0},
        "sample_prompts": ["a red disc"],
    },
    "joint": {
        "data": {"size": 16, "held_out_fraction": 0.2},
        "sample_prompts": ["a red disc"],
    },
    "energy": {
        "unet": {"channels": [64], "attention": [True], "head_dim": 32},
        "levels": 3,
        "langevin": 3,
        "data": {"size": 16, "held_out_fraction": 0.0},
        "sample_prompts": ["a red disc"],
    },
    "distill": {  # the student teaches from step 4 on
        "method": "progressive",
        "teacher_steps": 8,
        "steps": 2,
        "data": {"size": 16, "held_out_fraction": 0.0},
        "sample_prompts": ["a red disc"],
    },
}


def fork(work: Callable[[], object], log: Path) -> int:
    """A child that does `work`, with what it says in `log`; its process number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def train(stage: str, path: Path, *changes: str) -> None:
    """A stage's training, in this process."""
    module = SCRIPTS[stage]
    if stage == "finetune":
        config = module.resolve(module.override(module.read_yaml(path), list(changes)), stage)
    else:
        config = module.load_config(getattr(module, STAGES[stage]), path, list(changes))
    module.train(config, False)


class Lab:
    """A folder of pictures and the runs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.set_num_threads(1)
        picture_folder(folder / "pictures")
        for stage, config in CONFIGS.items():
            more = {need: str(folder / need) for need in [NEEDS.get(stage)] if need}
            every = {"log_every": 1, "checkpoint_every": 1, "evaluate_every": 8}
            text = json.dumps({**config, **more, **every, "optim": OPTIM})
            (folder / f"{stage}.yaml").write_text(text)  # JSON is YAML

    def start(
        self, stage: str, out: str, *overrides: str, before: Callable[[], object] = lambda: None
    ) -> int:
        """A run of a stage in a child that does `before` first."""

        def work() -> None:
            write_down_samples(self.folder / out)
            before()
            where = [f"out={self.folder / out}", f"data.root={self.folder / 'pictures'}"]
            train(stage, self.folder / f"{stage}.yaml", *where, *overrides)

        return fork(work, self.folder / f"{out}.log")

    def finish(self, *run: str, expect: int = 0) -> None:
        """A run to its end, which must be exit code `expect`."""
        self.ended(self.start(*run), run[1], expect)

    def ended(self, child: int, out: str, expect: int) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != expect:
            said = (self.folder / f"{out}.log").read_text()
            raise AssertionError(f"{out} ended with {code}, not {expect}:\n{said}")


def write_down_samples(out: Path) -> None:
    """Have the run append (step, samples) of every step that it computes to `samples.jsonl`."""
    gradients = Run.gradients

    def noted(self: Run, modules: Any, parameters: Any, share: Any, terms: Any) -> Any:
        keys = [item if isinstance(item[0], int) else item[1] for item in share]
        with (out / "samples.jsonl").open("a") as file:
            file.write(json.dumps([keys[0][0], [[k[1], k[2]] for k in keys]]) + "\n")
        return gradients(self, modules, parameters, share, terms)

    Run.gradients = noted


def samples_of(run: Path) -> dict[int, object]:
    """Step -> [place, sample] of a run; a step computed twice must have had the same."""
    found: dict[int, object] = {}
    for row in (run / "samples.jsonl").read_text().splitlines():
        try:
            step, samples = json.loads(row)
        except ValueError:  # a kill in the middle of the line
            continue
        assert found.setdefault(step, samples) == samples, f"{run.name}: step {step} changed"
    return found


def cpu() -> float:
    """Seconds of CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])

"""Pictures a second of stage 2, beside a script in the style of diffusers.

    OMP_NUM_THREADS=2 python training/measure/time_training.py --compile

Both train a U-Net of the bundled model's size, with its text tower frozen, an average
of the weights (EMA) and, in bf16, autocast: `training/diffusion.py`, and the loop of diffusers'
`train_text_to_image.py` as `time_finetune.py` reproduces it. They run in turn, round after round,
each time in a process of its own; the first steps are not counted, and neither is what
this trainer does once, encoding its pictures. Pictures are noise of 64 pixels, unless --data
names a folder.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from time_finetune import FEW, Clock, Enough, alone, between, some_pictures, steps_timed, theirs

from latentdiff.data.folder import list_folder
from latentdiff.files import writing_folder
from latentdiff.formats.location import find
from latentdiff.learning.config import validate

sys.path.insert(0, str(Path(__file__).parents[1]))
diffusion = import_module("diffusion")  # the script beside this folder


def ours(data: Path, model: Path, batch: int, steps: int, precision: str, compiled: bool) -> Clock:
    """The time of `steps` steps of training/diffusion.py, after FEW that are not counted."""
    with tempfile.TemporaryDirectory() as out:
        values: dict[str, object] = {
            "out": out,
            "precision": precision,
            "vae": str(model / "vae"),
            "data": {"root": str(data), "held_out_fraction": 0.0},
            "text": {"pretrained": str(model), "train": False},
            "objective": {"caption_dropout": 0.0},
            "optim": {"steps": FEW + steps + 1, "batch_size": batch},  # the last is not begun
            "compile": compiled,
            "sample_prompts": ["a cat"],
        }
        quiet = io.StringIO()
        with (
            contextlib.redirect_stderr(quiet),
            contextlib.redirect_stdout(quiet),
            steps_timed(FEW + steps) as ends,
            mock.patch.object(diffusion.Denoising, "evaluate", return_value=None),
            contextlib.suppress(Enough),
        ):
            diffusion.train(validate(diffusion.DiffusionConfig, values, "time_training"), False)
        return between(ends)


def noise(to: Path, count: int) -> None:
    """A folder of pictures of noise."""
    random = np.random.default_rng(0)
    with writing_folder(to, replace=False) as stage:
        lines: list[str] = []
        for number in range(count):
            pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(stage / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": f"noise {number}"}))
        (stage / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder of captioned pictures")
    parser.add_argument("--precision", nargs="+", choices=["no", "bf16"], default=["no", "bf16"])
    parser.add_argument("--compile", action="store_true", help="also with compile: true")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="that are timed, each time")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = find(None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        if given.data is None:
            noise(folder, given.batch)
        else:
            some_pictures(given.data, folder, given.batch, None)
        examples = list_folder(folder)
        print("| precision | what | pictures a second | ratio | ratio, in processor seconds |")
        print("|---|---|---|---|---|")
        for precision in given.precision:
            shape = given.batch, given.steps, precision
            own = partial(ours, folder, model, *shape)
            sides = {"script": partial(theirs, "full", examples, model, *shape)}
            sides["latentdiff"] = partial(own, False)
            if given.compile:
                sides["latentdiff, compile"] = partial(own, True)
            times: dict[str, list[Clock]] = {side: [] for side in sides}
            for _ in range(given.rounds):
                for side, run in sides.items():
                    times[side].append(alone(run))
            report(precision, times, given.batch * given.steps)


def report(precision: str, times: dict[str, list[Clock]], pictures: int) -> None:
    """Print medians of the rounds, and how much faster each is than the first."""
    first = next(iter(times.values()))
    for side, taken in times.items():
        cpu, wall = (
            statistics.median(a[kind] / b[kind] for a, b in zip(first, taken, strict=True))
            for kind in (0, 1)
        )
        rate = pictures / statistics.median(clock[1] for clock in taken)
        print(f"| {precision} | {side} | {rate:.1f} | {wall:.2f} | {cpu:.2f} |", flush=True)


if __name__ == "__main__":
    main()

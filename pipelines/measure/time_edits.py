"""Seconds for edits of a 128-pixel picture on the bundled model.

    python pipelines/measure/time_edits.py

20 steps of DPM-Solver++(2M), guidance 4: the least of three calls after loading, and of three of
the whole command, Python's start, imports and loading included. CPU seconds are told beside the
wall's, as a busy machine lengthens those far more.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

from latentdiff import ILVR, Blend, LatentDiffusionPipeline, RePaint, SDEdit, UserError
from latentdiff.diffusion.sampling import Edit
from latentdiff.pictures import save_png

PROMPT, CALLS, COMMANDS = "a red heart", 3, 3
START = "import sys; from latentdiff.cli import run; sys.exit(run())"  # as the installed command


def least(calls: int, run: Callable[[], object]) -> str:
    """Wall seconds of the quickest of some calls, and CPU seconds of the least, as table cells."""
    walls: list[float] = []
    cpus: list[float] = []
    for _ in range(calls):
        wall, cpu = time.perf_counter(), sum(os.times()[:4])  # of children that have ended, too
        run()
        walls.append(time.perf_counter() - wall)
        cpus.append(sum(os.times()[:4]) - cpu)
    return f"{min(walls):.2f} | {min(cpus):.2f}"


def edits(picture: Image.Image, mask: Image.Image) -> dict[str, Edit]:
    """The edits to time; SDEdit with strength 1 takes all 20 steps."""
    return {
        "SDEdit, strength 0.6": SDEdit(picture, 0.6),
        "SDEdit, strength 1": SDEdit(picture, 1.0),
        "ILVR": ILVR(picture),
        "ILVR, in pixels": ILVR(picture, space="pixels"),
        "Blend": Blend(picture, mask),
        "RePaint, 10 resamples": RePaint(picture, mask),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time edits on the bundled model.")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    given = parser.parse_args()
    try:
        pipe = LatentDiffusionPipeline.from_pretrained(given.model)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    picture, mask = Image.new("RGB", (128, 128), "white"), Image.new("L", (128, 128), 0)
    ImageDraw.Draw(picture).ellipse((16, 16, 111, 111), fill="red")
    ImageDraw.Draw(mask).rectangle((32, 32, 95, 95), fill=255)
    print("| after loading | seconds | CPU seconds | network calls |\n|---|---|---|---|")
    for name, edit in edits(picture, mask).items():
        nfe = pipe(PROMPT, edits=[edit], seed=0, progress=False).nfe
        seconds = least(CALLS, lambda edit=edit: pipe(PROMPT, edits=[edit], seed=0, progress=False))
        print(f"| {name} | {seconds} | {nfe} |")
    model = [] if given.model is None else ["--model", given.model]
    print("\n| whole command | seconds | CPU seconds |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture.png")
        save_png(picture, path)
        for command in ("edit", "ilvr"):
            line = [sys.executable, "-c", START, command, str(path), PROMPT]
            line += ["--out", folder, *model]
            seconds = least(
                COMMANDS, lambda line=line: subprocess.run(line, check=True, capture_output=True)
            )
            print(f"| `latentdiff {command}` | {seconds} |")


if __name__ == "__main__":
    main()

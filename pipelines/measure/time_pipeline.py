"""Seconds for one picture of the bundled model, here and in diffusers, on the same weights.

    python pipelines/measure/time_pipeline.py

20 steps of DPM-Solver++(2M), guidance 4, float32, after loading; the median of ten calls each,
taken in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.formats.location import find

PROMPT, STEPS, SCALE, CALLS = "a red heart", 20, 4.0, 10


def seconds(draw: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    draw()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one picture, here and in diffusers.")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    try:
        folder = find(parser.parse_args().model)
        ours = LatentDiffusionPipeline.from_pretrained(folder, dtype="float32")
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    theirs: Any = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    theirs.to(ours.bundle.device)
    sides: dict[str, Callable[[], object]] = {
        "latentdiff": lambda: ours(
            PROMPT, num_inference_steps=STEPS, guidance_scale=SCALE, seed=0, progress=False
        ),
        "diffusers": lambda: theirs(PROMPT, num_inference_steps=STEPS, guidance_scale=SCALE),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(CALLS + 1):
        for name, draw in sides.items():
            times[name].append(seconds(draw))
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.3f} s a picture")
    print(f"diffusers / latentdiff: {medians['diffusers'] / medians['latentdiff']:.2f}")


if __name__ == "__main__":
    main()

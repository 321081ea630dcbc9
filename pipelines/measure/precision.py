"""What bfloat16 changes: the pictures of the bundled model beside those of float32.

    python pipelines/measure/precision.py --data data/emoji128

Draws the same captions from the same noise in both precisions. A hit is a picture whose nearest
real one (root mean square of 32x32 blurred RGB, as in training/measure/evaluate.py) is of the emoji
that was asked for; PSNR is that of a picture to float32's. Prints a table for docs/benchmarks.md.
"""

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.metrics.nearest import blurred_thumbnails
from latentdiff.metrics.psnr import psnr

sys.path.insert(0, str(Path(__file__).parents[2] / "training" / "measure"))
evaluate = import_module("evaluate")  # what hits are, and what draws


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare pictures of bfloat16 with float32's.")
    parser.add_argument("--data", type=Path, default=Path("data/emoji128"), help="real pictures")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--style", default="noto", help="the style that it was trained on")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0, help="of captions and noise")
    given = parser.parse_args()
    try:
        compare(given)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def compare(given: argparse.Namespace) -> None:
    """Draw in both precisions and print the table."""
    pipes: dict[str, Any] = {
        dtype: LatentDiffusionPipeline.from_pretrained(given.model, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    }
    real = evaluate.RealPictures(given.data, pipes["float32"].bundle.size[0], [given.style])
    seen = real.numbers("train", untoned=True)
    wanted = [real.examples[n] for n in evaluate.choose(real, seen, given.captions, given.seed)]
    prompts = [example.captions[0] for example in wanted]
    print("| precision | hits | PSNR to float32, mean | least | processor seconds a picture |")
    print("|---|---|---|---|---|")
    whole: Tensor | None = None
    for dtype, pipe in pipes.items():
        start = time.process_time()
        drawn = evaluate.draw(pipe, prompts, given.steps, given.guidance_scale, given.seed)
        spent = (time.process_time() - start) / len(prompts)
        hits = sum(real.shows(blurred_thumbnails(drawn), wanted))
        near = ("", "")
        if whole is not None:
            levels = psnr(drawn, whole)
            near = (f"{float(levels.mean()):.1f} dB", f"{float(levels.min()):.1f} dB")
        whole = drawn if whole is None else whole
        row = (dtype, f"{hits} of {len(prompts)}", *near, f"{spent:.3f}")
        print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()

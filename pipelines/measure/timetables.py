"""Which timetable comes nearest to the converged picture in so many steps, on a real model.

    python pipelines/measure/timetables.py

Prints the median over the prompts of the PSNR of the pictures, in dB, to those of many steps of
"karras", for each timetable and number of steps, and that of half as many steps of "karras", which
is as far as the comparison goes.
"""

import argparse
from collections.abc import Sequence
from statistics import median

from torch import Tensor

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.diffusion.timetable import names
from latentdiff.metrics.psnr import psnr
from latentdiff.pipeline.arguments import MAX_STEPS, whole

PROMPTS = (
    "a red heart",
    "a grinning face",
    "a rocket",
    "a slice of pizza",
    "a cat face",
    "a green apple",
    "a sunflower",
    "a soccer ball",
)


def draw(
    pipe: LatentDiffusionPipeline, given: argparse.Namespace, timetable: str, steps: int
) -> Tensor:
    """A picture of each prompt, [B, 3, H, W] in [-1, 1]."""
    output = pipe(
        given.prompts,
        solver=given.solver,
        timetable=timetable,
        num_inference_steps=steps,
        guidance_scale=given.guidance_scale,
        seed=given.seed,
        output_type="pt",
        progress=False,
    )
    assert isinstance(output.images, Tensor)
    return output.images * 2 - 1


def nearness(pictures: Tensor, converged: Tensor) -> float:
    """Median over pictures of their PSNR in dB."""
    return median(psnr(pictures, converged).tolist())


def report(pipe: LatentDiffusionPipeline, given: argparse.Namespace, steps: Sequence[int]) -> None:
    converged = draw(pipe, given, "karras", given.converged)
    print(f"| timetable | {' | '.join(f'{count} steps' for count in steps)} |")
    print("|---" * (len(steps) + 1) + "|")
    for timetable in given.timetables:
        cells = [nearness(draw(pipe, given, timetable, count), converged) for count in steps]
        print(f"| `{timetable}` | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True)
    half = nearness(draw(pipe, given, "karras", given.converged // 2), converged)
    print(f"\n{given.converged // 2} steps of karras: {half:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare timetables on a model.")
    parser.add_argument("prompts", nargs="*", default=list(PROMPTS))
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--solver", default=None, help="default: the model's own")
    parser.add_argument(
        "--timetables", nargs="+", choices=names(), default=names(), metavar="TIMETABLE"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 20])
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--converged", type=int, default=200, help="steps of the converged run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        for count in (*given.steps, given.converged // 2):
            whole(count, "steps", 1, MAX_STEPS)
        pipe = LatentDiffusionPipeline.from_pretrained(given.model, dtype="float32")
        report(pipe, given, given.steps)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

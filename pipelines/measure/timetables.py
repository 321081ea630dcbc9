"""Which timetable comes nearest to the converged picture in so many steps, on a real model.

    python pipelines/measure/timetables.py

Prints the median over the prompts of the PSNR of the pictures, in dB, to those of many steps of
"karras", for each timetable and number of steps, and that of half as many steps of "karras", which
is as far as the comparison goes. With --gaussian there is no model: the data are Gaussian, with
the spectrum of natural pictures (a power of 1 / f^2) and Stable Diffusion's shape and schedule.
Their denoiser and flow are known, and the table tells signal to error in dB.
"""

import argparse
import math
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from latentdiff import LatentDiffusionPipeline, UserError, solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.denoiser import Estimate
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
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
    pipe: LatentDiffusionPipeline, given: argparse.Namespace, spacing: str, steps: int
) -> Tensor:
    """A picture of each prompt, [B, 3, H, W] in [-1, 1]."""
    output = pipe(
        given.prompts,
        solver=given.solver,
        timetable=spacing,
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


def gaussian_nearness(name: str, solver: str, steps: int) -> float:
    """Signal to error in dB of a run on Gaussian data, beside their exact flow."""
    frequency = torch.fft.fftfreq(64, dtype=torch.float64) * 64
    power = 1 / (frequency[:, None] ** 2 + frequency**2).clamp(min=1)
    power = power / power.mean()  # of each Fourier mode [64, 64]

    def denoise(x: Tensor, level: NoiseLevel) -> Estimate:
        return Estimate(level.alpha * power * x / (level.alpha**2 * power + level.sigma**2))

    where = process.create("vp-scaled-linear")
    levels = timetable.create(name, where, steps)
    noise = NoiseStreams(0)
    drawn = noise.draw((4, 64, 64)).double()
    start = drawn * (levels[0].alpha ** 2 * power + levels[0].sigma ** 2).sqrt()
    end = sampling.sample(denoise, solvers.create(solver, where), levels, start, noise=noise)
    truth = drawn * power.sqrt()
    return 10 * math.log10(float(truth.square().mean() / (end - truth).square().mean()))


def report_gaussian(given: argparse.Namespace) -> None:
    print(f"| timetable | {' | '.join(f'{count} steps' for count in given.steps)} |")
    print("|---" * (len(given.steps) + 1) + "|")
    for name in given.timetables:
        cells = [gaussian_nearness(name, given.solver or "dpmpp-2m", n) for n in given.steps]
        print(f"| `{name}` | {' | '.join(f'{cell:.1f}' for cell in cells)} |")


def report(pipe: LatentDiffusionPipeline, given: argparse.Namespace, steps: Sequence[int]) -> None:
    converged = draw(pipe, given, "karras", given.converged)
    print(f"| timetable | {' | '.join(f'{count} steps' for count in steps)} |")
    print("|---" * (len(steps) + 1) + "|")
    for name in given.timetables:
        cells = [nearness(draw(pipe, given, name, count), converged) for count in steps]
        print(f"| `{name}` | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True)
    half = nearness(draw(pipe, given, "karras", given.converged // 2), converged)
    print(f"\n{given.converged // 2} steps of karras: {half:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare timetables on a model.")
    parser.add_argument("prompts", nargs="*", default=list(PROMPTS))
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--solver", default=None, help="default: the model's own")
    parser.add_argument(
        "--timetables",
        nargs="+",
        choices=timetable.names(),
        default=timetable.names(),
        metavar="TIMETABLE",
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 20])
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--converged", type=int, default=200, help="steps of the converged run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gaussian", action="store_true", help="no model, but Gaussian data")
    given = parser.parse_args()
    try:
        for count in (*given.steps, given.converged // 2):
            whole(count, "steps", 1, MAX_STEPS)
        if given.gaussian:
            report_gaussian(given)
            return
        pipe = LatentDiffusionPipeline.from_pretrained(given.model, dtype="float32")
        report(pipe, given, given.steps)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

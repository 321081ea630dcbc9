"""Compare the convergence of the solvers per call of the network, on a real model.

    python pipelines/measure/compare_solvers.py --out comparison

Writes a grid of one prompt's pictures (a solver a row, a number of steps a column) and a plot of
the distance to the converged latents against the calls of the network, and prints the table of the
distances: the median over the prompts of the root mean square of a picture's latents, which have
about unit variance. (A mean would be that of the few pictures that end as other ones.)
Converged is DPM-Solver++(3M) along many steps of "karras"; the distance between that and half as
many steps is printed, too.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.cli.output import check_writable
from latentdiff.files import make_folder
from latentdiff.pictures import labelled, save_png, to_pil
from latentdiff.pipeline.arguments import MAX_STEPS, whole
from latentdiff.solvers import names

PROMPTS = (
    "a red heart",
    "a grinning face",
    "a rocket",
    "a slice of pizza",
    "a cat face",
    "a green apple",
    "a sunflower",
    "a soccer ball",
    "a house",
    "an octopus",
    "a police car",
    "a bell",
)
SOLVERS = (
    "ddim",
    "heun",
    "dpm2",
    "dpmpp-2s",
    "gddim",
    "plms",
    "deis",
    "lms",
    "dpmpp-2m",
    "dpmpp-3m",
    "unipc",
    "unipc-3",
)
STEPS = (5, 8, 10, 15, 20, 30)
COLOURS = (
    "#000000",
    "#999999",
    "#8c6d31",
    "#e7ba52",
    "#7b4173",
    "#ce6dbd",
    "#3182bd",
    "#6baed6",
    "#d62728",
    "#fd8d3c",
    "#31a354",
    "#006d2c",
)
Points = dict[str, list[tuple[int, float]]]


def compare(
    pipe: LatentDiffusionPipeline,
    prompts: Sequence[str],
    solvers: Sequence[str],
    steps: Sequence[int],
    scale: float,
    converged_steps: int,
) -> tuple[list[Image.Image], Points, float]:
    """The first prompt's pictures, row by row; for each solver (calls, distance to the converged
    latents); and the distance of half as many steps from the converged latents themselves."""

    def latents(solver: str, count: int, timetable: str) -> tuple[Tensor, int]:
        output = pipe(
            prompts,
            solver=solver,
            timetable=timetable,
            num_inference_steps=count,
            guidance_scale=scale,
            seed=0,
            output_type="latent",
            progress=False,
        )
        return output.latents, output.nfe

    converged, _ = latents("dpmpp-3m", converged_steps, "karras")
    half, _ = latents("dpmpp-3m", converged_steps // 2, "karras")
    pictures: list[Image.Image] = []
    points: Points = {}
    for solver in solvers:
        for count in steps:
            ends, calls = latents(solver, count, "trailing")
            points.setdefault(solver, []).append((calls, _distance(ends, converged)))
            pictures.append(to_pil(pipe.bundle.autoencoder.decode(ends[:1])[0]))
    return pictures, points, _distance(half, converged)


def _distance(one: Tensor, other: Tensor) -> float:
    """The median over pictures [B, C, H, W] of their root mean square distance."""
    return (one - other).square().flatten(1).mean(1).sqrt().median().item()


def plot(points: Points, width: int = 900, height: int = 600) -> Image.Image:
    """Distance against calls, both logarithmic, a line a solver."""
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    places = [point for line in points.values() for point in line]
    left, right, top, bottom = 70, width - 120, 20, height - 50
    xs = [math.log(calls) for calls, _ in places]
    ys = [math.log10(max(away, 1e-9)) for _, away in places]
    low, high = math.floor(min(ys)), math.ceil(max(ys))

    def across(calls: float) -> float:
        return left + (math.log(calls) - min(xs)) / max(max(xs) - min(xs), 1e-9) * (right - left)

    def down(away: float) -> float:
        return bottom - (math.log10(max(away, 1e-9)) - low) / max(high - low, 1) * (bottom - top)

    for calls in sorted({calls for calls, _ in places if calls in (5, 10, 20, 30, 50, 100)}):
        draw.line((across(calls), top, across(calls), bottom), "#dddddd")
        draw.text((across(calls), bottom + 8), str(calls), "black", font, anchor="mt")
    for power in range(low, high + 1):
        for tenth in (1, 2, 5) if power < high else (1,):
            y = down(tenth * 10**power)
            draw.line((left, y, right, y), "#dddddd")
            draw.text((left - 8, y), f"{tenth * 10.0**power:g}", "black", font, anchor="rm")
    draw.text(((left + right) / 2, height - 18), "calls of the network", "black", font, "mm")
    draw.text((left + 6, top + 4), "distance to the converged latents", "black", font)
    for index, (solver, line) in enumerate(points.items()):
        colour = COLOURS[index % len(COLOURS)]
        ends = [(across(calls), down(away)) for calls, away in line]
        draw.line(ends, colour, 2)
        for x, y in ends:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        draw.text((right + 14, top + 20 * index), solver, colour, font)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare solvers on a model.")
    parser.add_argument("prompts", nargs="*", default=list(PROMPTS))
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument(
        "--solvers", nargs="+", choices=names(), default=list(SOLVERS), metavar="SOLVER"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--converged", type=int, default=200, help="steps of the converged run")
    parser.add_argument("--out", type=Path, default=Path("comparison"))
    given = parser.parse_args()
    files = [given.out / name for name in ("grid.png", "plot.png")]
    for file in files:
        if file.exists():
            parser.exit(2, f"error: {file} is there already: name another folder.\n")
    try:
        check_writable(given.out)
        for count in (*given.steps, given.converged // 2):
            whole(count, "steps", 1, MAX_STEPS)
        pipe = LatentDiffusionPipeline.from_pretrained(given.model, dtype="float32")
        pictures, points, floor = compare(
            pipe, given.prompts, given.solvers, given.steps, given.guidance_scale, given.converged
        )
        make_folder(given.out)
        table = labelled(pictures, given.solvers, [f"{count}" for count in given.steps])
        print(save_png(table, files[0]))
        print(save_png(plot(points), files[1]))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"\n| solver | {' | '.join(f'{count} steps' for count in given.steps)} |")
    print("|---" * (len(given.steps) + 1) + "|")
    for solver, line in points.items():
        cells = (f"{away:.3f} ({calls})" for calls, away in line)
        print(f"| `{solver}` | {' | '.join(cells)} |")
    print(f"\nBetween {given.converged // 2} and {given.converged} steps: {floor:.4f}")


if __name__ == "__main__":
    main()

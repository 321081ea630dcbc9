"""Which solver comes nearest to the end for how many calls of the network, on a real model.

    python pipelines/compare_solvers.py "a red heart" --model path/to/model --out comparison

Writes a grid of pictures (a solver a row, a number of steps a column), a plot of the distance to
the converged latents against the calls of the network, and prints the same as a table.
"""

import argparse
import math
from pathlib import Path

from PIL import Image, ImageDraw

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.pictures import grid, save_png, to_pil
from latentdiff.pipeline import PipelineOutput

SOLVERS = ("ddim", "heun", "dpm2", "dpmpp-2s", "dpmpp-2m", "dpmpp-3m", "deis", "lms", "unipc")
STEPS = (4, 6, 8, 12, 20, 30)
COLOURS = ("black", "gray", "orange", "gold", "red", "purple", "blue", "teal", "green")
Points = dict[str, list[tuple[int, float]]]


def compare(
    pipe: LatentDiffusionPipeline,
    prompt: str,
    solvers: list[str],
    steps: list[int],
    scale: float,
    converged_steps: int = 200,
) -> tuple[list[Image.Image], Points]:
    """The pictures, row by row, and for each solver (calls, distance to the converged latents)."""

    def latents(solver: str, count: int) -> PipelineOutput:
        return pipe(
            prompt,
            solver=solver,
            num_inference_steps=count,
            guidance_scale=scale,
            seed=0,
            output_type="latent",
            progress=False,
        )

    converged = latents("dpmpp-3m", converged_steps).latents
    pictures: list[Image.Image] = []
    points: Points = {}
    for solver in solvers:
        for count in steps:
            output = latents(solver, count)
            away = (output.latents - converged).square().mean().sqrt().item()
            points.setdefault(solver, []).append((output.nfe, away))
            pictures.append(to_pil(pipe.bundle.decode(output.latents)[0]))
    return pictures, points


def plot(points: Points, side: int = 640) -> Image.Image:
    """Distance against calls, both logarithmic, a line a solver, named at its end."""
    image = Image.new("RGB", (side + 120, side), "white")
    draw = ImageDraw.Draw(image)
    places = [point for line in points.values() for point in line]
    xs = [math.log(calls) for calls, _ in places]
    ys = [math.log(max(away, 1e-9)) for _, away in places]

    def place(calls: int, away: float) -> tuple[float, float]:
        x = (math.log(calls) - min(xs)) / max(max(xs) - min(xs), 1e-9)
        y = (math.log(max(away, 1e-9)) - min(ys)) / max(max(ys) - min(ys), 1e-9)
        return 50 + x * (side - 90), side - 40 - y * (side - 80)

    draw.rectangle((40, 30, side - 30, side - 30), outline="gray")
    draw.text(
        (50, side - 25), f"calls of the network, {min(places)[0]} .. {max(places)[0]}", "black"
    )
    draw.text(
        (45, 10),
        f"distance to converged, {math.exp(min(ys)):.1e} .. {math.exp(max(ys)):.1e}",
        "black",
    )
    for index, (solver, line) in enumerate(points.items()):
        colour = COLOURS[index % len(COLOURS)]
        draw.line([place(*point) for point in line], fill=colour, width=2)
        draw.text((side - 20, 40 + 20 * index), solver, colour)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare solvers on a model.")
    parser.add_argument("prompt", nargs="?", default="a red heart")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=Path("comparison"))
    given = parser.parse_args()
    try:
        pipe = LatentDiffusionPipeline.from_pretrained(given.model)
        pictures, points = compare(
            pipe, given.prompt, given.solvers, given.steps, given.guidance_scale
        )
        given.out.mkdir(parents=True, exist_ok=True)
        print(save_png(grid(pictures, len(given.steps)), given.out / "grid.png"))
        print(save_png(plot(points), given.out / "plot.png"))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"\n| solver | {' | '.join(f'{count} steps' for count in given.steps)} |")
    print("|---" * (len(given.steps) + 1) + "|")
    for solver, line in points.items():
        cells = (f"{away:.4f} ({calls})" for calls, away in line)
        print(f"| `{solver}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""`latentdiff generate`: pictures out of words."""

import math
import secrets
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from latentdiff.cli import options
from latentdiff.cli.models import about_loras, open_model
from latentdiff.cli.output import about_model, check_writable, png_text
from latentdiff.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentdiff.pipeline import LatentDiffusionPipeline

# Pixels drawn at once: enough to keep a processor busy, few enough for its memory.
_DRAWN_AT_ONCE = 2**20


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to draw.")],
    number: Annotated[
        int, typer.Option("-n", "--number", min=1, max=10_000, help="Pictures of each prompt.")
    ] = 1,
    seed: options.Seed = None,
    first: Annotated[
        int,
        typer.Option(min=0, help="Begin with this picture of the seed: the index in a PNG's text."),
    ] = 0,
    out: options.Out = Path("outputs"),
    grid: Annotated[bool, typer.Option("--grid", help="Also all of them in one picture.")] = False,
    steps: options.StepCount = 20,
    guidance: Annotated[
        str, typer.Option(metavar="NAME", help="cfg, apg or cfg++ (its scale is 0 .. 1).")
    ] = "cfg",
    guidance_scale: options.GuidanceScale = 4.0,
    rescale: Annotated[
        float, typer.Option(min=0, max=1, help="How much of guidance's contrast to take back.")
    ] = 0.0,
    guide: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:SCALE",
            help="Beside it: pag:3, seg:3, clip:SCALE:FOLDER, classifier:SCALE:FOLDER:LABEL; "
            "may be repeated.",
        ),
    ] = None,
    negative: options.Negative = None,
    also: options.AlsoPrompts = None,
    weights: options.Weights = False,
    solver: options.SolverName = None,
    timetable: options.TimetableName = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Height and width in pixels. Default: the model's own."),
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels.")] = None,
    model: options.Model = None,
    lora: options.Loras = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    no_metadata: options.NoMetadata = False,
) -> None:
    """Draw pictures of what each PROMPT says.

    They are written as NUMBER-SEED.png, never over another file, and their paths printed. The text
    inside each tells all that is needed to draw it again.
    """
    if size is not None and (height is not None or width is not None):
        raise UserError("--size is height and width: give it, or --height and --width.")
    check_writable(out)
    from latentdiff.pipeline.prompts import check_prompts

    check_prompts(prompts)
    pipe = open_model(model, device, dtype, lora)
    own_height, own_width = pipe.bundle.size
    settings: _Settings = {
        "negative_prompt": negative,
        "also": also or [],
        "prompt_weights": weights,
        "num_inference_steps": steps,
        "guidance": guidance,
        "guidance_scale": guidance_scale,
        "guidance_rescale": rescale,
        "guides": guide or [],
        "solver": pipe.bundle.solver if solver is None else solver,
        "timetable": pipe.bundle.steps.spacing if timetable is None else timetable,
        "height": height or size or own_height,
        "width": width or size or own_width,
    }
    seed = secrets.randbelow(2**32) if seed is None else seed
    wanted = [prompt for prompt in prompts for _ in range(number)]
    record: dict[str, object] | None = None
    if not no_metadata:
        record = about_model(pipe.bundle) | {**settings} | about_loras(lora)
    columns = number if 1 < number < len(wanted) else math.ceil(math.sqrt(len(wanted)))
    drawn = _draw(pipe, wanted, seed, first, settings)
    _write(drawn, seed, out, record, columns if grid else None)


class _Settings(TypedDict):
    """What is the same for all pictures of a command, by the pipeline's own names."""

    negative_prompt: str | None
    also: list[str]
    prompt_weights: bool
    num_inference_steps: int
    guidance: str
    guidance_scale: float
    guidance_rescale: float
    guides: list[str]
    solver: str
    timetable: str
    height: int
    width: int


def _draw(
    pipe: "LatentDiffusionPipeline", prompts: list[str], seed: int, first: int, settings: _Settings
) -> Iterator["tuple[str, int, Image]"]:
    """A prompt, its picture's index within the seed, and the picture, for each of the prompts."""
    at_once = max(1, _DRAWN_AT_ONCE // (settings["height"] * settings["width"]))
    for start in range(0, len(prompts), at_once):
        chunk = prompts[start : start + at_once]
        output = pipe(
            chunk, seed=seed, first=first + start, progress=sys.stderr.isatty(), **settings
        )
        yield from zip(chunk, output.indices, output.images, strict=True)


def _write(
    drawn: Iterable["tuple[str, int, Image]"],
    seed: int,
    out: Path,
    record: dict[str, object] | None,
    columns: int | None,
) -> None:
    """Save each picture as soon as it is there, and at last the grid, and print the paths."""
    from latentdiff.pictures import grid, save_numbered_png, save_png

    paths: list[Path] = []
    kept: list[tuple[str, int, Image]] = []
    for prompt, index, image in drawn:
        text = png_text(record, prompt=prompt, seed=seed, index=index)
        paths.append(save_numbered_png(image, out, seed, text))
        if len(paths) == 1:  # not sooner: a refusal shall be the only line
            print(f"seed {seed}", file=sys.stderr)
        print(paths[-1], flush=True)
        kept += [(prompt, index, image)] if columns else []
    if columns:
        prompts, indices, images = zip(*kept, strict=True)
        text = png_text(record, prompt=prompts, seed=seed, index=indices)
        path = paths[0].with_name(f"{paths[0].stem}-grid.png")
        print(save_png(grid(images, columns), path, text))

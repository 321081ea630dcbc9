"""`latentdiff generate`: pictures out of words."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentdiff.cli.controls import fitted
from latentdiff.cli.kept import is_given, settled, take_settings
from latentdiff.cli.options import RunOptions, seed_or_fresh, with_run_options
from latentdiff.cli.output import check_writable, draw_in_parts, place_of
from latentdiff.errors import UserError, warn
from latentdiff.reading import read_text, reason

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentdiff.bundle import Bundle
    from latentdiff.pipeline import Request


# Steps of pictures below which packed weights take about as long to make as they save.
_PACKED_FROM = 40


@with_run_options
def generate(
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT",
            help="What to draw; @FILE is a prompt in each line of a file. A prompt that begins "
            "with @ itself begins with @@.",
        ),
    ],
    *,
    context: typer.Context,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="PICTURE",
            is_eager=True,
            callback=take_settings,
            help="Draw a picture again, with its own settings where no option says otherwise; of "
            "latentdiff, A1111, ComfyUI or InvokeAI. Files that it was drawn with, as models and "
            "LoRAs, are to be named again.",
        ),
    ] = None,
    number: Annotated[
        int, typer.Option("-n", "--number", min=1, max=10_000, help="Pictures of each prompt.")
    ] = 1,
    grid: Annotated[bool, typer.Option("--grid", help="Also all of them in one picture.")] = False,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Height and width in pixels. Default: the model's own."),
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels.")] = None,
    run: RunOptions,
) -> None:
    """Draw pictures of what each PROMPT says.

    They are written as NUMBER-SEED.png, never over another file, and their paths printed. The text
    inside each tells all that is needed to draw it again, with --from.
    """
    if size is not None and (is_given(context, "height") or is_given(context, "width")):
        raise UserError("--size is height and width: give it, or --height and --width.")
    check_writable(run.out)
    prompts = [prompt for word in prompts for prompt in _prompts(word)]
    run = run.naming(prompts)
    if source is not None:
        run = settled(context, source, run)
    from latentdiff.pipeline.prompts import check_prompts
    from latentdiff.pipeline.record import about_request

    check_prompts(prompts)
    run.check()
    from latentdiff.bundle import Bundle

    steps = run.steps or Bundle.num_inference_steps
    few = run.engine == "auto" and len(prompts) * number * steps <= _PACKED_FROM
    engine = "eager" if few else run.engine
    pipe = run.models.load(run.device, run.dtype, engine, run.attention)
    if few:
        from latentdiff.models.engines import with_code

        itself = pipe.bundle.network, pipe.bundle.autoencoder
        network, autoencoder = with_code(itself, itself)
        pipe.bundle = replace(pipe.bundle, network=network, autoencoder=autoencoder)
    own_height, own_width = pipe.bundle.size
    request = run.request(pipe.bundle)
    pictured = (size, height, width) == (None, None, None) and bool(request.controls)
    height, width = size or height or own_height, size or width or own_width
    if pictured:  # the run is as large as its control picture
        request = replace(request, controls=fitted(request.controls, max(pipe.bundle.size)))
    else:
        request = replace(request, height=height, width=width)
    seed = seed_or_fresh(run.seed)
    wanted = [prompt for prompt in prompts for _ in range(number)]
    request = replace(request, seed=seed, first=run.first)
    pixels = round(height * width * run.enlargement)
    drawn = draw_in_parts(pipe, wanted, request, pixels, run.show(pipe.bundle))

    def about() -> dict[str, object] | None:
        return None if run.no_metadata else about_request(pipe.bundle, request) | run.about()

    _write(drawn, request, run.out, about, number, grid=grid)
    if not run.lora and not run.embedding:  # whose words no caption tells
        _tell_of_far(pipe.bundle, prompts)


def _prompts(word: str) -> list[str]:
    """The prompts of an argument: itself, or the lines of @FILE that are not empty; @@ is an @.

    Raises:
        UserError: the file cannot be read.
    """
    if not word.startswith("@"):
        return [word]
    if word.startswith("@@"):
        return [word[1:]]
    file = Path(word[1:])
    try:
        lines = read_text(file, 2**24).splitlines()
    except OSError as error:
        raise UserError(f"cannot read the prompts of {file}: {reason(error)}") from None
    return [line.strip() for line in lines if line.strip()]


def _tell_of_far(bundle: "Bundle", prompts: Sequence[str]) -> None:
    """Warn of prompts that are far from all that a model knows, after they are drawn: it takes a
    second to find out."""
    from latentdiff.pipeline.vocabulary import far

    for prompt, nearest in far(bundle, prompts):
        warn(
            f"{prompt!r:.60} is far from all captions of {bundle.name}; the nearest are "
            f"{'; '.join(nearest)} (`latentdiff words` lists more)"
        )


def _write(
    drawn: Iterable["tuple[str, int, Image]"],
    request: "Request",
    out: Path,
    about: Callable[[], dict[str, object] | None],
    number: int,
    *,
    grid: bool,
) -> None:
    """Save each picture as soon as it is there, and at last the grid, and print the paths.

    Args:
        about: the record of the pictures, once one is drawn: by which engine is known then.
        number: pictures of each prompt.
    """
    from latentdiff import pictures
    from latentdiff.pipeline.record import png_text

    paths: list[Path] = []
    kept: list[tuple[str, int, Image]] = []
    seed = request.seed
    assert isinstance(seed, int)
    for place, (prompt, index, image) in enumerate(drawn):
        own = {"prompt": prompt, "seed": seed, "index": index} | place_of(request, place)
        own.pop("first", None)
        text = png_text(about(), **own)
        paths.append(pictures.save_numbered_png(image, out, seed, text))
        if len(paths) == 1:  # not sooner: a refusal shall be the only line
            print(f"seed {seed}", file=sys.stderr)
        print(paths[-1], flush=True)
        kept += [(prompt, index, image)] if grid else []
    if grid:
        prompts, indices, images = zip(*kept, strict=True)
        columns = number if 1 < number < len(kept) else math.ceil(math.sqrt(len(kept)))
        all_of_them = {"prompt": prompts, "index": indices, "num_images_per_prompt": number}
        all_of_them |= place_of(request, 0)
        all_of_them.pop("first", None)
        text = png_text(about(), seed=seed, **all_of_them)
        path = paths[0].with_name(f"{paths[0].stem}-grid.png")
        print(pictures.save_png(pictures.grid(images, columns), path, text))

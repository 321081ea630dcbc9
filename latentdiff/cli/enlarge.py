"""`latentdiff enlarge`: a picture drawn larger by an upscaling model."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.cli.edit import draw
from latentdiff.cli.options import RunOptions, seed_or_fresh, with_run_options
from latentdiff.cli.output import check_writable
from latentdiff.errors import UserError

MOST = 16.0
_STEPS = 2  # of the bundled model: more steps put in more that is not there


@with_run_options
def enlarge(
    picture: Annotated[
        Path, typer.Argument(metavar="PICTURE", help="PNG, JPEG, WebP, BMP or AVIF.")
    ],
    factor: Annotated[
        float,
        typer.Argument(
            metavar="FACTOR", min=1, max=MOST, help="How many times larger, along a side."
        ),
    ],
    *,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What PICTURE shows, for a model that reads it.")
    ] = "",
    noise_level: Annotated[
        int,
        typer.Option(
            min=0,
            help="Noise to put onto PICTURE, of 1000 levels: 0 trusts each pixel, more lets the "
            "model mend them.",
        ),
    ] = 0,
    hold: Annotated[
        bool,
        typer.Option(
            "--hold/--no-hold", help="Make the result, shrunk again, equal to PICTURE, or not."
        ),
    ] = True,
    run: RunOptions,
) -> None:
    """Draw PICTURE larger by an upscaling model, in windows where it is larger than the model's.

    A model enlarges by one ratio: for a larger FACTOR it is asked again, and what is too large is
    shrunk. Without --model it is emoji128-enlarge, which learned emoji, enlarges by 2 and takes 2
    steps; --model names another, of Stable Diffusion's x4 upscaler's layout, or one of `latentdiff
    train diffusion` with data.low_resolution.
    """
    if not factor > 1:
        raise UserError(f"FACTOR: above 1 and up to {MOST:g}, not {factor:g}.")
    from latentdiff.formats.location import BUNDLED_ENLARGER

    if run.model is None:
        run = replace(run, model=BUNDLED_ENLARGER, steps=run.steps or _STEPS)
    run = run.naming([prompt])
    worded = prompt or run.negative or run.also or run.region
    if run.guidance_scale is None and not worded:
        run = replace(run, guidance_scale=1.0)  # nothing leads from no words to no words
    run.check()
    check_writable(run.out)
    from PIL.Image import Resampling

    from latentdiff.diffusion.edits import Edit
    from latentdiff.editing import Enlarge, TiledDiffusion
    from latentdiff.pictures import open_picture

    image = open_picture(picture)
    width, height = (max(1, round(side * factor)) for side in image.size)
    pipe = run.models.load(run.device, run.dtype, run.engine, run.attention)
    low = pipe.bundle.network.low_resolution
    if low is None:
        raise UserError(f"{pipe.bundle.name} enlarges no pictures: --model names one that does.")
    passes = max(1, math.ceil(math.log(factor, low.ratio) - 1e-9))
    windows: list[Edit | str] = [TiledDiffusion()]
    if any(guide.startswith("tiled:") for guide in run.guides):
        windows = []
    run = replace(run, seed=seed_or_fresh(run.seed))
    for _ in range(passes - 1):
        edits = [Enlarge(image, noise_level, hold), *windows]
        request = replace(run.request(pipe.bundle, edits), prompt=prompt, seed=run.seed)
        image = pipe.draw(replace(request, first=run.first)).images[0]
    about = {"edit": "Enlarge", "picture": picture.name, "factor": factor}
    about |= {"noise_level": noise_level, "hold": hold}
    edits = [Enlarge(image, noise_level, hold), *windows]
    draw(
        pipe,
        edits,
        prompt,
        1,
        run,
        None,
        about,
        [picture],
        lambda large: large.resize((width, height), Resampling.LANCZOS),
    )

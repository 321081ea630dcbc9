"""`latentdiff grid`: one prompt under two settings that vary, side by side."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentdiff.cli.controls import fitted
from latentdiff.cli.options import Prompt, RunOptions, seed_or_fresh, with_run_options
from latentdiff.cli.output import check_writable
from latentdiff.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# What may vary: an option that needs no other model, and the type of its values.
VARYING = {
    "prompt": str,
    "negative": str,
    "seed": int,
    "steps": int,
    "guidance": str,
    "guidance_scale": float,
    "rescale": float,
    "solver": str,
    "timetable": str,
}
_MOST = 400  # pictures
Axis = tuple[str, list[object]]


@with_run_options
def grid(
    prompt: Prompt,
    *,
    x: Annotated[
        str,
        typer.Option(
            metavar="NAME=VALUES",
            help=f"What varies from left to right, as steps=5,10,20. One of {', '.join(VARYING)}; "
            "prompts are parted by |.",
        ),
    ],
    y: Annotated[
        str | None,
        typer.Option(metavar="NAME=VALUES", help="What varies from top to bottom."),
    ] = None,
    run: RunOptions,
) -> None:
    """Draw PROMPT under settings that vary, into one picture with labels."""
    if run.preview is not None:
        raise UserError("--preview is not for grids: leave it out.")
    across, down = read_axis(x), read_axis(y) if y else ("", [None])
    if across[0] == down[0]:
        raise UserError(f"--x and --y both vary {across[0]}: vary another with one of them.")
    if len(across[1]) * len(down[1]) > _MOST:
        raise UserError(f"{len(across[1]) * len(down[1])} pictures; at most {_MOST} are drawn.")
    run = replace(run, seed=seed_or_fresh(run.seed), variation_seed=run.varied)
    cells = [
        _varied(run, prompt, [(across[0], a), (down[0], b)]) for b in down[1] for a in across[1]
    ]
    check_writable(run.out)
    run = run.naming([words for _, words in cells])
    cells = [(replace(one, lora=run.lora), words) for one, words in cells]
    for one, _ in cells:
        one.check()
    from latentdiff.guidance.from_text import resolve
    from latentdiff.pictures import labelled, save_numbered_png
    from latentdiff.pipeline.record import about_request, png_text

    pipe = run.models.load(run.device, run.dtype, run.engine, run.attention)
    images: list[Image] = []
    read = run.request(pipe.bundle)  # once: none of these varies
    controls = fitted(read.controls, max(pipe.bundle.size))
    guides = resolve(read.edits, pipe.bundle.device)
    for one, words in cells:
        request = replace(
            one.settings(pipe.bundle),
            prompt=words,
            seed=one.seed,
            first=one.first,
            edits=guides,
            controls=controls,
            image_prompts=read.image_prompts,
        )
        images += pipe.draw(request, progress=sys.stderr.isatty()).images
    columns = [f"{across[0]} {value}" for value in across[1]]
    rows = [f"{down[0]} {value}" if down[0] else "" for value in down[1]]
    record = about_request(pipe.bundle, read) | run.about()
    varied = {"grid": prompt, "x": x, "y": y, "seed": run.seed, "index": run.first}
    varied |= {} if run.variation_seed is None else {"variation_seed": run.variation_seed}
    text = None if run.no_metadata else png_text(record, **varied)
    print(f"seed {run.seed}", file=sys.stderr)
    print(save_numbered_png(labelled(images, rows, columns), Path(run.out), run.seed or 0, text))


def read_axis(text: str) -> Axis:
    """The name and the values of "steps=5,10,20".

    Raises:
        UserError: nothing of that name varies, there is no value, or one is of a wrong type.
    """
    name, _, listed = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    if name not in VARYING:
        raise UserError(f"{text!r:.60}: what varies is one of {', '.join(VARYING)}, as steps=5,10.")
    words = [word.strip() for word in listed.split("|" if name == "prompt" else ",")]
    try:
        values: list[object] = [VARYING[name](word) for word in words if word]
    except ValueError:
        raise UserError(f"{text!r:.60}: {name} takes {VARYING[name].__name__} values.") from None
    if name == "steps" and not all(1 <= int(f"{value}") <= 1000 for value in values):
        raise UserError(f"{text!r:.60}: steps are 1 to 1000.")
    if not values:
        raise UserError(f"{text!r:.60}: name at least one value, as steps=5,10.")
    return name, values


def _varied(
    run: RunOptions, prompt: str, settings: list[tuple[str, object]]
) -> tuple[RunOptions, str]:
    for name, value in settings:
        if name == "prompt":
            prompt = f"{value}"
        elif name:
            run = replace(run, **{name: value})
    return run, prompt

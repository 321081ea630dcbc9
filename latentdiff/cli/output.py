"""Output shared by the commands that draw."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from latentdiff.models.autoencoder import Autoencoder
    from latentdiff.pipeline import LatentDiffusionPipeline, Request, Run

# Pixels drawn at once: enough to keep a processor busy, few enough for its memory, and on a CPU
# (eight pictures of the bundled model, within a tenth of its best speed) for one's patience.
_DRAWN_AT_ONCE = 2**20
_DRAWN_AT_ONCE_BY_CPU = 2**15


def pixels_at_once(device: "torch.device") -> int:
    """Pixels of the pictures that are drawn in one batch on a device."""
    return _DRAWN_AT_ONCE_BY_CPU if device.type == "cpu" else _DRAWN_AT_ONCE


def draw_in_parts(
    pipe: "LatentDiffusionPipeline",
    prompts: Sequence[str],
    request: "Request",
    pixels: int,
    show: "Callable[[Run], None] | None" = None,
) -> Iterator["tuple[str, int, Image]"]:
    """Draw a picture for each prompt, some at once, and hand each on as soon as it is there.

    Where long prompts are read, those that differ are drawn one after another: in one call all get
    as many chunks as the longest has, so that a picture would depend on the others.

    Args:
        pipe: the model.
        prompts: one for each picture.
        request: of all of them, but for the prompts.
        pixels: of one picture.
        show: called after each step.

    Yields:
        A prompt, its picture's index within the seed, and the picture.
    """
    from tqdm import tqdm

    from latentdiff.guidance.from_text import resolve

    request = replace(request, edits=resolve(request.edits, pipe.bundle.device))  # read once
    at_once = max(1, pixels_at_once(pipe.bundle.device) // pixels)
    start = 0
    while start < len(prompts):
        chunk = list(prompts[start : start + at_once])
        if request.reading.long:
            chunk = list(takewhile(chunk[0].__eq__, chunk))
        part = replace(request, prompt=chunk, **place_of(request, start))
        run = pipe.prepare(part)
        hidden = not sys.stderr.isatty()
        for _ in tqdm(run.steps(), total=len(run), disable=hidden, leave=False):
            if show is not None:
                show(run)
        output = run.finish()
        yield from zip(chunk, output.indices, output.images, strict=True)
        start += len(chunk)


def previewing(file: Path, by: "Autoencoder | None") -> "Callable[[Run], None]":
    """Make a function that writes to a file what a run is drawing, all its pictures in one.

    Args:
        file: a PNG, written anew each time.
        by: the autoencoder that previews are decoded with; None decodes none.
    """
    from latentdiff.pictures import grid, save_png

    def show(run: "Run") -> None:
        images = run.preview(quick=by is None, by=by)
        assert isinstance(images, list)
        save_png(grid(images, 8), file, replace=True)

    return show


def place_of(request: "Request", number: int) -> dict[str, int]:
    """Return the field of a request that draws its picture `number` alone: the seed of a variation,
    or the index."""
    if isinstance(request.variation_seed, int):
        return {"variation_seed": (request.variation_seed + number) % 2**64}
    return {"first": request.first + number}


def check_writable(folder: Path) -> None:
    """Check that pictures can be written to a folder before any is drawn; creates nothing.

    Raises:
        UserError: the folder, or its nearest parent that exists, cannot be written to.
    """
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    if not nearest.is_dir():
        raise UserError(f"cannot write to {folder}: {nearest} is a file; choose another --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: permission denied; choose another --out")

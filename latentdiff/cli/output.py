"""Output shared by the commands that draw: pictures, their text chunks and messages."""

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import UserError
from latentdiff.version import __version__

if TYPE_CHECKING:
    from latentdiff.bundle import Bundle
    from latentdiff.pipeline import Request


def png_text(record: dict[str, object] | None, **picture: object) -> dict[str, str] | None:
    """The text chunk of a PNG: one JSON object; None where none is wanted."""
    if record is None:
        return None
    return {"latentdiff": json.dumps({**picture, **record}, ensure_ascii=False)}


def about_model(bundle: "Bundle") -> dict[str, object]:
    """Record the model for the text chunk of a picture."""
    precision = str(bundle.network.dtype).removeprefix("torch.")
    return {"version": __version__, "model": bundle.name, "dtype": precision}


def about_request(bundle: "Bundle", request: "Request") -> dict[str, object]:
    """Record model and arguments for the text chunk of a picture, by the pipeline's own names."""
    record = about_model(bundle) | {
        "negative_prompt": request.negative_prompt,
        "also": request.also,
        "prompt_weights": request.prompt_weights,
        "num_inference_steps": request.num_inference_steps,
        "guidance": request.guidance,
        "guidance_scale": request.guidance_scale,
        "guidance_rescale": request.guidance_rescale,
        "edits": [edit for edit in request.edits if isinstance(edit, str)],
        "solver": request.solver,
        "timetable": request.timetable,
        "height": request.height,
        "width": request.width,
    }
    if request.guidance_interval != (0.0, math.inf):
        record["guidance_interval"] = list(request.guidance_interval)
    return record


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

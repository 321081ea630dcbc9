"""What every command that draws says and writes."""

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
    """What the text of a picture says of the model that drew it."""
    precision = str(bundle.network.dtype).removeprefix("torch.")
    return {"version": __version__, "model": bundle.name, "dtype": precision}


def about_request(bundle: "Bundle", request: "Request") -> dict[str, object]:
    """What the text of a picture says of its model and of its run, by the pipeline's own names."""
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
    """Whether pictures can be put there, before time is spent on them; nothing is made yet.

    Raises:
        UserError: they cannot.
    """
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    if not nearest.is_dir():
        raise UserError(f"cannot write to {folder}: {nearest} is a file; choose another --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: permission denied; choose another --out")

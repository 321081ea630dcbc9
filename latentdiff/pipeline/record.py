"""What a picture keeps of how it was drawn: one JSON object in a text chunk of its PNG."""

import json
import math

from latentdiff.bundle import Bundle
from latentdiff.formats.location import public_name
from latentdiff.pipeline.request import Request
from latentdiff.version import __version__

KEYWORD = "latentdiff"  # of the PNG's text chunk


def png_text(record: dict[str, object] | None, **picture: object) -> dict[str, str] | None:
    """The text chunk of a PNG: one JSON object; None where none is wanted."""
    if record is None:
        return None
    return {KEYWORD: json.dumps({**picture, **record}, ensure_ascii=False)}


def about_model(bundle: Bundle) -> dict[str, object]:
    """Record the model for the text chunk of a picture."""
    precision = str(bundle.network.dtype).removeprefix("torch.")
    return {"version": __version__, "model": public_name(bundle.name), "dtype": precision}


def about_request(bundle: Bundle, request: Request) -> dict[str, object]:
    """Record model and arguments for the text chunk of a picture, by the pipeline's own names."""
    record = about_model(bundle) | {
        "negative_prompt": request.negative_prompt,
        "also": request.also,
        "prompt_weights": request.prompt_weights,
        "num_inference_steps": request.num_inference_steps,
        "guidance": request.guidance,
        "guidance_scale": request.scale,
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

"""What a picture keeps of how it was drawn, in text chunks of its PNG: `formats.picture_text`."""

import json
import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

from latentdiff.bundle import Bundle
from latentdiff.diffusion.edits import Edit
from latentdiff.formats.location import public_name
from latentdiff.formats.picture_text import OURS, THEIRS, a1111_text
from latentdiff.guidance.from_text import public_guide
from latentdiff.pipeline.request import Request
from latentdiff.version import __version__


def png_text(record: dict[str, object] | None, **picture: object) -> dict[str, str] | None:
    """The text chunks of a PNG: one JSON object, and the same in A1111's words for other programs.

    None where none are wanted.
    """
    if record is None:
        return None
    settings = {**picture, **record}
    texts = {OURS: json.dumps(settings, ensure_ascii=False)}
    if isinstance(settings.get("prompt"), str):
        texts[THEIRS] = a1111_text(settings)
    return texts


def about_model(bundle: Bundle) -> dict[str, object]:
    """Record the model for the text chunk of a picture."""
    precision = str(bundle.network.dtype).removeprefix("torch.")
    return {
        "version": __version__,
        "model": public_name(bundle.name),
        "dtype": precision,
        "engine": bundle.engine,
    }


def about_request(bundle: Bundle, request: Request) -> dict[str, object]:
    """Record model and arguments for the text chunk of a picture, by the pipeline's own names."""
    record = about_model(bundle) | {
        "negative_prompt": request.negative_prompt,
        "also": [one for one in request.also if isinstance(one, str) or not _has_place(one)],
        "prompt_weights": request.prompt_weights,
        "long_prompts": request.long_prompts,
        "prompt_syntax": request.prompt_syntax,
        "clip_skip": request.clip_skip,
        "num_inference_steps": request.num_inference_steps,
        "guidance": request.guidance,
        "guidance_scale": request.scale_for(bundle.network),
        "guidance_rescale": request.guidance_rescale,
        "edits": [public_guide(edit) for edit in request.edits if isinstance(edit, str)],
        "solver": request.solver,
        "timetable": request.timetable,
        "height": request.height,
        "width": request.width,
    }
    for name in request.sizes.given():
        value = getattr(request.sizes, name)
        record[name] = value if name.endswith("score") else list(value)
    if request.variation_strength:
        record["variation_strength"] = request.variation_strength
    if regions := [one for one in request.also if not isinstance(one, str) and _has_place(one)]:
        record["regions"] = [_region(one) for one in regions]
    record |= _about_edits([edit for edit in request.edits if not isinstance(edit, str)])
    if request.guidance_interval != (0.0, math.inf):
        record["guidance_interval"] = list(request.guidance_interval)
    return record


def _has_place(also: Sequence[object]) -> bool:
    """True of a further prompt that weighs something in a part of the picture only."""
    return len(also) == 3 or not isinstance(also[1], int | float)


def _region(also: Sequence[object]) -> str:
    """A further prompt with a place, as `--region` reads it; a file by its name."""
    weight = also[1] if len(also) == 3 else 1.0
    place = also[-1] if isinstance(also[-1], str | Path) else "a picture"
    name = f"{place}" if f"{place}".startswith("box:") else Path(place).name
    return f"{also[0]}:{weight}@{name}"


def _about_edits(edits: Sequence[Edit]) -> dict[str, object]:
    """The names of edits that are values, and their numbers; their pictures are not kept."""
    record: dict[str, object] = {}
    for edit in edits:
        numbers = fields(edit) if is_dataclass(edit) else ()
        values = {one.name: getattr(edit, one.name) for one in numbers}
        record |= {name: value for name, value in values.items() if isinstance(value, int | float)}
    if edits:
        record["edit"] = ", ".join(type(edit).__name__ for edit in edits)
    return record

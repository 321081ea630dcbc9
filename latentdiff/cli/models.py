"""The model that a command uses, with its LoRAs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import UserError

if TYPE_CHECKING:
    from latentdiff.cli.options import DtypeName
    from latentdiff.pipeline import LatentDiffusionPipeline


def open_model(
    model: str | None, device: str, dtype: "DtypeName", loras: Sequence[str] | None
) -> "LatentDiffusionPipeline":
    """The pipeline, with each LoRA of `--lora` in it."""
    wanted = [parse_lora(text) for text in loras or ()]
    from latentdiff.pipeline import LatentDiffusionPipeline

    pipe = LatentDiffusionPipeline.from_pretrained(model, dtype=dtype, device=device)
    for number, (path, scale) in enumerate(wanted):
        pipe.load_lora(path, scale, f"lora{number}")
    return pipe


def about_loras(loras: Sequence[str] | None) -> dict[str, object]:
    """Record the LoRAs and their scales for the text chunk of a picture."""
    wanted = [parse_lora(text) for text in loras or ()]
    return {"loras": [[path.name, scale] for path, scale in wanted]} if wanted else {}


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE; a file whose own name has a colon in it is found as well.

    Raises:
        UserError: what follows the last colon is no number, and the whole is no file.
    """
    path, colon, scale = text.rpartition(":")
    try:
        if not colon or Path(text).exists():
            return Path(text), 1.0
    except OSError as error:  # a name too long
        raise UserError(f"--lora {text!s:.100}: {error.strerror}.") from error
    try:
        number = float(scale)
    except ValueError as error:
        # C:\cats.safetensors has a colon, and no scale.
        if "/" in scale or "\\" in scale or scale.endswith(".safetensors"):
            return Path(text), 1.0
        raise UserError(
            f"--lora {text!s:.200}: '{scale!s:.40}' is no scale; FILE:0.8 is meant."
        ) from error
    if not path or not math.isfinite(number):
        raise UserError(f"--lora {text!s:.200}: a file and a finite scale are needed: FILE:0.8.")
    return Path(path), number

"""`latentdiff convert`: a model from one layout to the other, with LoRAs in its weights."""

from pathlib import Path
from typing import Annotated

import typer

from latentdiff.cli import options
from latentdiff.cli.models import DtypeName, ModelOptions
from latentdiff.cli.output import check_writable
from latentdiff.errors import UserError


def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, a .safetensors file, a Hugging Face name, or emoji64."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A new folder, or a new .safetensors file.")
    ],
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", metavar="FILE:SCALE", help="A LoRA to add to the weights; may be given again."
        ),
    ] = None,
    vae: options.Vae = None,
    prediction: options.PredictionName = None,
    variant: options.Variant = None,
    embedding: options.Embeddings = None,
    dtype: Annotated[
        DtypeName,
        typer.Option(help="Precision of the weights in OUT; auto writes float32."),
    ] = "auto",
) -> None:
    """Write MODEL as a folder in the diffusers layout, or as one file for ComfyUI and A1111."""
    check_writable(out.parent)
    try:
        taken = out.is_symlink() or out.exists()
    except OSError as error:
        raise UserError(f"{out!s:.200}: {error.strerror}.") from error
    if taken:
        raise UserError(f"{out}: it is there already; name another.")
    pipe = ModelOptions(model, vae, prediction, variant, lora, embedding).load("cpu", "float32")
    import torch

    bundle = pipe.fuse_loras() if lora else pipe.bundle
    print(bundle.save(out, dtype=getattr(torch, "float32" if dtype == "auto" else dtype)))

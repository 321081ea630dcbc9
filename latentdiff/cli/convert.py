"""`latentdiff convert`: a model, or a LoRA, from one layout to the other."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from latentdiff.cli import options
from latentdiff.cli.models import DtypeName, ModelOptions
from latentdiff.cli.output import check_writable
from latentdiff.errors import UserError, shown
from latentdiff.registry import check_name

if TYPE_CHECKING:
    from latentdiff.bundle import Bundle

_WORTH_A_LINE = 50_000_000  # bytes


def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a .safetensors file, a Hugging Face name, or emoji128; or a LoRA file.",
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
    layout: Annotated[
        str | None,
        typer.Option(
            help="Of a LoRA: kohya, for ComfyUI and A1111, diffusers or peft. Default: kohya."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "-m", "--model", metavar="BASE", help="The model of a LoRA. Default: the bundled one."
        ),
    ] = None,
    dtype: Annotated[
        DtypeName,
        typer.Option(help="Precision of the weights in OUT; auto writes float32."),
    ] = "auto",
) -> None:
    """Write MODEL as a folder in the diffusers layout, or as one file for ComfyUI and A1111; or a
    LoRA of BASE in another layout."""
    check_writable(out.parent)
    try:
        taken = out.is_symlink() or out.exists()
    except OSError as error:
        raise UserError(f"{out!s:.200}: {error.strerror}.") from error
    if taken:
        raise UserError(f"{out}: it is there already; name another.")
    precision = "float32" if dtype == "auto" else dtype
    models = ModelOptions(model, vae, prediction, variant, lora, embedding)
    if _convert_lora(models, out, base, layout, precision):
        return
    pipe = models.load("cpu", "float32")
    import torch

    bundle = pipe.fuse_loras() if lora else pipe.bundle
    size = sum(p.numel() for module in bundle.modules.values() for p in module.parameters())
    size *= getattr(torch, precision).itemsize
    if size >= _WORTH_A_LINE:
        print(f"writing {size / 1e9:.1f} GB to {shown(out)}", file=sys.stderr)
    print(bundle.save(out, dtype=getattr(torch, precision)))
    if not out.is_dir() and (strange := _not_understood(bundle)):
        print(f"ComfyUI and A1111 will draw it wrongly: {'; '.join(strange)}", file=sys.stderr)


def _not_understood(bundle: "Bundle") -> list[str]:
    """Name what a single file does not tell ComfyUI and A1111, which take it for granted."""
    from latentdiff.diffusion import process

    text: Any = next(iter(bundle.conditioner.modules.values()))
    xl = len(bundle.conditioner.modules) > 1 or bundle.conditioner.pooled_width is not None
    scale = 0.13025 if xl else 0.18215
    strange: list[str] = []
    if bundle.latent_channels != 4:
        strange.append(f"its latents have {bundle.latent_channels} channels, not 4")
    elif bundle.autoencoder.scaling_factor != scale:
        strange.append(
            f"its latents are scaled by {bundle.autoencoder.scaling_factor}, not {scale}"
        )
    if text.config.vocab_size != 49408:
        strange.append(f"its vocabulary is of {text.config.vocab_size} tokens, not CLIP's")
    if bundle.prediction == "v" and text.config.hidden_act == "quick_gelu" and not xl:
        strange.append(
            "a model of version 1 that predicts v is taken for eps (A1111 reads a .yaml beside it, "
            "ComfyUI has the node ModelSamplingDiscrete)"
        )
    elif bundle.prediction not in ("eps", "v"):
        strange.append(f"it predicts {bundle.prediction}, not eps or v")
    usual = ["vp-scaled-linear"] + xl * ["vp-scaled-linear-zsnr"]  # of which XL's files tell
    if not any(process.agree(bundle.process, process.create(name)) for name in usual):
        strange.append("its noise schedule is not that of Stable Diffusion")
    return strange


def _convert_lora(
    models: ModelOptions, out: Path, base: str | None, layout: str | None, precision: str
) -> bool:
    """Write a LoRA in a layout; False where the model that is named is none.

    Raises:
        UserError: it is none, but an option is for one, or the other way round; or it cannot be
            read or written.
    """
    from latentdiff import lora

    path = f"{models.model}"
    if not lora.is_lora(path):
        if layout is not None or base is not None:
            raise UserError(f"{path}: --layout and --model are for a LoRA, which it is not.")
        return False
    if models.about():
        raise UserError(
            f"{path}: --lora, --vae, --prediction, --variant and --embedding are for a model, "
            "which it is not, but a LoRA."
        )
    import torch

    if out.suffix != ".safetensors":
        raise UserError(f"{out}: a LoRA is written as one .safetensors file.")
    check_name("LoRA layout", layout or "kohya", get_args(lora.Layout))
    bundle = ModelOptions(base).load("cpu", "float32").bundle
    known = cast(lora.Layout, layout or "kohya")
    print(lora.convert_lora(path, out, bundle, known, getattr(torch, precision)))
    return True

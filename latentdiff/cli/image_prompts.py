"""`--image-prompt ADAPTER:PICTURE[:SCALE]` and `--image-encoder`: IP-Adapters of a command."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.cli.controls import by_name, parse_control
from latentdiff.errors import UserError

if TYPE_CHECKING:
    from latentdiff.bundle import Bundle
    from latentdiff.models.image_prompts import ImageAdapter
    from latentdiff.pipeline import ImagePrompt


def check_image_prompts(prompts: Sequence[str], encoder: Path | None) -> None:
    """Check the options before anything is loaded.

    Raises:
        UserError: no such adapter, picture or encoder, or an encoder without an adapter.
    """
    from latentdiff.formats.location import find_file

    for text in prompts:
        adapter, picture, _ = _parsed(text)
        find_file(adapter, "IP-Adapter")
        find_file(picture, "picture")
    if encoder is not None:
        find_file(encoder, "image encoder")
        if not prompts:
            raise UserError("--image-encoder is for --image-prompt: give both, or neither.")


def opened(prompts: Sequence[str], encoder: Path | None, bundle: "Bundle") -> "list[ImagePrompt]":
    """The image prompts of runs of a model, each of their adapters read once, to where the model
    is, and their pictures opened.

    Raises:
        UserError: as `ImagePrompt`.
    """
    from latentdiff.formats.ip_adapter import load_ip_adapter
    from latentdiff.pipeline import ImagePrompt

    loaded: dict[Path, ImageAdapter] = {}
    made: list[ImagePrompt] = []
    for adapter, picture, scale in map(_parsed, prompts):
        if adapter not in loaded:
            device, dtype = bundle.device, bundle.network.dtype
            loaded[adapter] = load_ip_adapter(adapter, encoder=encoder, device=device, dtype=dtype)
        made.append(ImagePrompt(loaded[adapter], picture, scale))
    return made


def files_of(prompts: Sequence[str]) -> list[Path]:
    """The adapters and the pictures of `--image-prompt`."""
    return [path for text in prompts for path in _parsed(text)[:2]]


def about(prompts: Sequence[str], encoder: Path | None) -> dict[str, object]:
    """Record the image prompts for the text chunk of a picture."""
    record: dict[str, object] = {"image_prompts": [by_name(*_parsed(one)) for one in prompts]}
    return record | ({} if encoder is None else {"image_encoder": encoder.name}) if prompts else {}


def _parsed(text: str) -> tuple[Path, Path, float]:
    example = "models/ip-adapter_sd15.safetensors:photo.png:0.6"
    return parse_control(text, "--image-prompt", "ADAPTER", example)

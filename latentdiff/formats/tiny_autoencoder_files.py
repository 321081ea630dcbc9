"""Files of tiny autoencoders: TAESD's own two, ComfyUI's one, or that of diffusers.

TAESD is published as `taesd_encoder.safetensors` and `taesd_decoder.safetensors`, whose names are
places in a sequence of layers (`3.conv.0.weight`); the decoder's first layer there is its soft
limit, which has no place in the names of diffusers. ComfyUI's one file has both sequences under
`taesd_encoder.` and `taesd_decoder.`, and in two numbers the scale and shift by which latents of
the autoencoder it stands for become its own.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError
from latentdiff.formats.weights import WeightFiles
from latentdiff.models.tiny_autoencoder import TinyAutoencoder

_SIDES = ("encoder", "decoder")
_COMFY = "taesd_"
_SCALE, _SHIFT = "vae_scale", "vae_shift"


def is_tiny(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True for the names of a tiny autoencoder, or of one side of it."""
    return any(f"{prefix}3.conv.0.weight" in shapes for prefix in _prefixes())


def _prefixes() -> list[str]:
    layers = [f"{side}.layers." for side in _SIDES]
    return ["", *layers, *(f"{_COMFY}{side}." for side in _SIDES)]


def open_tiny(file: Path, scale: float) -> tuple[TinyAutoencoder, WeightFiles]:
    """A tiny autoencoder, without memory yet, and its weights.

    Args:
        file: any of its files; of TAESD's own two the other lies beside it, under the same name
            but for "encoder" or "decoder". A config.json beside diffusers' is read.
        scale: the latents of the autoencoder that ComfyUI's file stands for are divided by it.

    Raises:
        UserError: the other file is not there, or it is damaged or of another kind.
    """
    from latentdiff.formats import diffusers_folder as parts

    stored = WeightFiles([file])
    beside = file.parent / "config.json"
    if any(name.startswith("encoder.layers.") for name in stored.shapes):
        files, config = stored, _config(stored.shapes)
        if beside.is_file():
            config = parts.read_config(beside)
    elif any(name.startswith(_COMFY) for name in stored.shapes):
        files = WeightFiles([file], _comfy_name)
        config = _config(files.shapes) | _comfy_scale(stored, scale)
    else:
        files = _joined(file)
        config = _config(files.shapes)
    module = parts.vae_of(config, "vae", files)
    assert isinstance(module, TinyAutoencoder)
    return module, files


def _joined(file: Path) -> WeightFiles:
    """Encoder and decoder in one, by the names of diffusers.

    Raises:
        UserError: one is not there, or the two have the same names.
    """
    found: dict[str, Path] = {}
    for side, other in (_SIDES, _SIDES[::-1]):
        if side in file.name:
            found = {side: file, other: file.with_name(file.name.replace(side, other))}
    if not found:
        raise UserError(
            "one side of a tiny autoencoder: name it taesd_encoder.safetensors or "
            "taesd_decoder.safetensors, with the other one beside it."
        )
    if missing := [path.name for path in found.values() if not path.is_file()]:
        raise UserError(f"one side of a tiny autoencoder: {missing[0]} must lie beside it.")
    both = WeightFiles([found["encoder"]], _placed("encoder", 0))
    both.include(WeightFiles([found["decoder"]], _placed("decoder", 1)))
    return both


def _placed(side: str, first: int) -> Callable[[str], str]:
    """Names of TAESD to those of diffusers; `first` is the place of the first convolution."""

    def name(stored: str) -> str:
        place = re.match(r"(\d{1,4})\.", stored)
        if place is None or int(place[1]) < first:
            return f"{side}.{stored}"  # which no such network has
        return f"{side}.layers.{int(place[1]) - first}{stored[place.end() - 1 :]}"

    return name


def _comfy_name(stored: str) -> str | None:
    if stored in (_SCALE, _SHIFT):
        return None
    for first, side in enumerate(_SIDES):
        if stored.startswith(prefix := f"{_COMFY}{side}."):
            return _placed(side, first)(stored.removeprefix(prefix))
    return stored


def _comfy_scale(stored: WeightFiles, scale: float) -> dict[str, float]:
    """The scale and shift of a file of ComfyUI, which computes z = (latents / scale - a) * b.

    Raises:
        UserError: they are no numbers, or the scale is 0.
    """
    shift, own = (
        stored.number(name) if name in stored.shapes else default
        for name, default in ((_SHIFT, 0.0), (_SCALE, 1.0))
    )
    if own == 0:
        raise UserError(f"its {_SCALE} is 0.")
    return {"scaling_factor": scale / own, "shift_factor": -shift * own}


def _config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config that the names and shapes of diffusers' layout tell.

    Raises:
        UserError: they are of another network.
    """
    config: dict[str, Any] = {"_class_name": TinyAutoencoder.diffusers_name}
    for side in _SIDES:
        first = shapes.get(f"{side}.layers.0.weight", ())
        if len(first) != 4:
            raise UserError(f"it holds no {side} of a tiny autoencoder.")
        levels = _blocks(shapes, f"{side}.layers.")
        config[f"num_{side}_blocks"] = levels
        config[f"{side}_block_out_channels"] = [first[0]] * len(levels)
        if side == "decoder":
            config["latent_channels"] = first[1]
    return config


def _blocks(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> list[int]:
    """The number of blocks behind each convolution but the last."""
    place_in = re.compile(rf"{re.escape(prefix)}(\d{{1,4}})\.")
    places = {int(match[1]) for name in shapes if (match := place_in.match(name))}
    levels: list[int] = []
    for place in sorted(places):
        if f"{prefix}{place}.weight" in shapes:
            levels.append(0)
        elif levels:
            levels[-1] += 1
    return levels[:-1]

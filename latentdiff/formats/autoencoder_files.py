"""An autoencoder in a file or folder of its own, which a model is given in place of another."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from latentdiff.errors import UserError
from latentdiff.formats import single_file_names as ldm
from latentdiff.formats.location import find_autoencoder
from latentdiff.formats.single_file import vae_config, vae_files
from latentdiff.formats.tiny_autoencoder_files import is_tiny, open_tiny
from latentdiff.formats.weights import WeightFiles, blaming, fill
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.haar import autoencoder_of

if TYPE_CHECKING:
    from latentdiff.formats.diffusers_folder import VAE


def load_autoencoder(where: str | Path, scale: float = 0.18215) -> Autoencoder:
    """An autoencoder alone, in float32 on the CPU, frozen.

    Args:
        where: see `open_autoencoder`; or a hub id as "owner/name".
        scale: see `open_autoencoder`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = find_autoencoder(where)
    module, files = open_autoencoder(path, scale)
    with blaming(path):
        autoencoder = autoencoder_of(module)
    fill(module, files, torch.float32, torch.device("cpu"))
    return autoencoder


def open_autoencoder(where: Path, scale: float = 0.18215) -> "tuple[VAE, WeightFiles]":
    """An autoencoder, without memory yet, and its weights.

    Args:
        where: a folder in the diffusers layout, of an autoencoder or of a whole model; or a
            .safetensors file of either, as A1111 and ComfyUI have them, or of a tiny autoencoder:
            see `formats.tiny_autoencoder_files`. Latents are scaled as its config, its header or
            the .yaml beside it says, else by `scale`.
        scale: by default that of Stable Diffusion 1 and 2.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from latentdiff.formats import diffusers_folder as parts

    if where.is_dir():
        inside = where / "vae"
        return parts.vae(inside if (inside / "config.json").is_file() else where)
    with blaming(where):
        stored = WeightFiles([where])
        shapes = stored.shapes
        if is_tiny(shapes):
            return open_tiny(where, scale)
        if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in shapes):
            if (where.parent / "config.json").is_file():
                return parts.vae(where.parent)
            raise UserError(
                "an autoencoder in the names of diffusers, which needs its config.json beside it."
            )
        prefix = ldm.VAE if any(name.startswith(ldm.VAE) for name in shapes) else ""
        if f"{prefix}decoder.conv_in.weight" not in shapes:
            raise UserError("it holds no autoencoder.")
        config = vae_config(where, stored, prefix, scale)
        files = vae_files(where, config, prefix)
        return parts.vae_of(config, "vae", files), files

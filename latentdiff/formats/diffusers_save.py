"""Writing a model folder: all of it, or none."""

import contextlib
import copy
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.models.autoencoder import latent_affine, latent_channels

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


def save_network(network: "AutoencoderKL | VQModel", folder: Path) -> None:
    """Write one network as diffusers lays it out: all of it, or nothing.

    Raises:
        UserError: the folder cannot be written, or a weight is not finite.
    """
    with staged(folder) as stage:
        save_diffusers(network, stage, None)


@contextlib.contextmanager
def replacing_model(folder: Path) -> Iterator[Path]:
    """A folder beside a model's that takes its place at the end.

    Raises:
        UserError: the folder cannot be written, or holds something that is no model.
    """
    replaceable = (folder / "model_index.json").is_file() or not folder.exists()
    if not replaceable and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: not a model folder, so it is not replaced; name another.")
    with staged(folder) as stage:
        yield stage


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place at the end."""
    token = secrets.token_hex(8)
    stage = folder.parent / f".{folder.name}.{token}.part"
    old = folder.parent / f".{folder.name}.{token}.old"
    try:
        stage.mkdir(parents=True)
        yield stage
        for path in (*stage.rglob("*"), stage):
            _sync(path)
        if folder.exists():
            folder.rename(old)
        stage.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {folder}: {reason}.") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def sweep(target: Path) -> None:
    """Put right what writers of `target`, a folder or a file, left beside it when they were killed.

    Only where nobody else writes: what a writer at work has there would go, too.
    """
    rest = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.(part|old)")
    for path in [path for path in target.parent.iterdir() if rest.fullmatch(path.name)]:
        if path.suffix == ".old" and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: dict[str, object]) -> None:
    """A config as the others of a model folder are written."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def save_tensors(values: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """One safetensors file, staged beside the target and renamed once it is on the disk.

    Raises:
        UserError: it cannot be written, or a value is not finite.
    """
    _check_finite(values, path.name)
    stage = path.parent / f".{path.name}.{secrets.token_hex(8)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage.touch()
        mode = stage.stat().st_mode
        save_file(
            {k: v.contiguous() for k, v in values.items()}, stage, {"format": "pt"} | metadata
        )
        stage.chmod(mode)  # safetensors lets only its owner read
        _sync(stage)
        stage.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}."
        ) from error
    finally:
        stage.unlink(missing_ok=True)


def _check_finite(values: dict[str, Tensor], name: str) -> None:
    for key, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{name}: {key} is not finite as {value.dtype}.")


def save_weights(values: dict[str, Tensor], path: Path, dtype: torch.dtype | None) -> None:
    """Write tensors beside the `config.json` that is there already.

    Raises:
        UserError: one is not finite in that precision.
    """
    converted = {
        name: value.detach().to("cpu", dtype or value.dtype).contiguous()
        for name, value in values.items()
    }
    _check_finite(converted, path.parent.name)
    save_file(converted, path, metadata={"format": "pt"})
    shutil.copymode(path.with_name("config.json"), path)  # safetensors lets only its owner read


def save_diffusers(
    network: "AutoencoderKL | VQModel | UNet2DConditionModel",
    folder: Path,
    dtype: torch.dtype | None,
) -> None:
    """A network of diffusers as a folder with its config and weights.

    Raises:
        UserError: a weight is not finite in that precision.
    """
    network.save_config(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    save_weights(network.state_dict(), path, dtype)


def without_offset(vae: "AutoencoderKL | VQModel") -> "AutoencoderKL | VQModel":
    """The same autoencoder, with any latent mean folded into its 1x1 convolutions."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from latentdiff.models.vae import standardise_latents

    if not isinstance(vae, AutoencoderKL) or not (vae.quant_conv and vae.post_quant_conv):
        return vae
    if not (vae.config["shift_factor"] or vae.config["latents_mean"]):
        return vae
    gain, offset = (part.flatten().expand(latent_channels(vae)) for part in latent_affine(vae))
    folded: Any = copy.deepcopy(vae).requires_grad_(False)
    folded.to(torch.float32)
    std = (gain * vae.config["scaling_factor"]).to(vae.device)
    standardise_latents(folded, offset.to(vae.device), std)
    folded.register_to_config(shift_factor=None, latents_mean=None, latents_std=None)
    return folded.to(vae.dtype)

"""Stable Diffusion 1 and 2, and models of their shape: U-Net, autoencoder, one text encoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from latentdiff.errors import UserError
from latentdiff.formats import scheduler_config
from latentdiff.formats.families import Choices, Config, Nouns, Opened, Weights
from latentdiff.formats.scheduler_config import Described
from latentdiff.formats.weights import blaming, read_json
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.conditioner import TextConditioner
from latentdiff.models.network import DiffusersUNet, Kind
from latentdiff.models.text_encoders import ClipTower, TextTower

if TYPE_CHECKING:
    from latentdiff.formats.diffusers_folder import VAE, UNet
    from latentdiff.formats.weights import WeightFiles

# Parts of other families.
_FOREIGN = ("text_encoder_2", "transformer", "prior", "image_encoder")

_PIPELINES: dict[Kind, str] = {
    "text-to-image": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "instruct-pix2pix": "StableDiffusionInstructPix2PixPipeline",
}


def claims_folder(index: Mapping[str, object]) -> bool:
    """True where the model has no part of another family."""
    return all(index.get(part) in (None, [None, None]) for part in _FOREIGN)


def claims_file(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True where the file holds a U-Net under its name in Stable Diffusion."""
    from latentdiff.formats.single_file_names import UNET

    return any(name.startswith(UNET) for name in shapes)


def open_folder(folder: Path, choices: Choices) -> Opened:
    """See `Family.open_folder`."""
    from latentdiff.formats import diffusers_folder as parts
    from latentdiff.formats.autoencoder_files import open_autoencoder

    path = folder / "model_index.json"
    index = read_json(path)
    for part in _FOREIGN:
        if index.get(part) not in (None, [None, None]):
            raise UserError(
                f"{path}: a {index.get('_class_name')!s:.60} with a {part}; only models of one "
                "U-Net, one VAE and one text encoder work here."
            )
    variant = choices.variant
    if variant is not None:
        parts.check_variant(folder, variant)
    unet, unet_files = parts.unet(folder / "unet", variant)
    if choices.vae is None:
        vae, vae_files = parts.vae(folder / "vae", variant)
    else:
        vae, vae_files = open_autoencoder(choices.vae)
    text, text_files = parts.text(folder / "text_encoder", folder / "tokenizer", variant)
    described = scheduler_config.read_folder(folder)
    with blaming(folder):
        return _opened((unet, unet_files), (vae, vae_files), (text, text_files), described)


def open_file(file: Path, choices: Choices) -> Opened:
    """See `Family.open_file`."""
    from latentdiff.formats.autoencoder_files import open_autoencoder
    from latentdiff.formats.single_file import open_single

    if choices.variant is not None:
        raise UserError(
            f"{file}: a single file has no variants; only the weights of a folder have."
        )
    unet, own, text, schedule = open_single(file, choices.vae is None)
    vae = own if choices.vae is None else open_autoencoder(choices.vae)
    assert vae is not None
    described = scheduler_config.read(schedule, f"{file}: scheduler")
    with blaming(file):
        return _opened(unet, vae, text, described)


def _opened(
    unet: "tuple[UNet, WeightFiles]",
    vae: "tuple[VAE, WeightFiles]",
    text: "tuple[TextTower, WeightFiles]",
    described: Described,
) -> Opened:
    autoencoder = DiffusersAutoencoder(vae[0])
    network = DiffusersUNet(unet[0], autoencoder.channels)
    weights = [
        Weights(unet[0], unet[1], steady=False),
        Weights(vae[0], vae[1], steady=True),
        Weights(text[0].model, text[1], steady=True),
    ]
    nouns = Nouns(autoencoder, TextConditioner(text[0]), network)
    return Opened(nouns, weights, described)


def write_folder(stage: Path, nouns: Nouns, schedule: Config, dtype: torch.dtype | None) -> None:
    """See `Family.write_folder`. A latent mean is folded into the autoencoder's convolutions."""
    from latentdiff.formats.diffusers_save import (
        save_diffusers,
        save_text,
        without_offset,
        write_config,
    )

    vae = without_offset(_vae(nouns))
    nouns = Nouns(DiffusersAutoencoder(vae), nouns.conditioner, nouns.network)
    save_diffusers(vae, stage / "vae", dtype)
    save_diffusers(_unet(nouns), stage / "unet", dtype)
    save_text(_tower(nouns), stage, dtype)
    write_config(_index(nouns, schedule), stage / "model_index.json")


def write_file(path: Path, nouns: Nouns, schedule: Config, dtype: torch.dtype | None) -> None:
    """See `Family.write_file`."""
    from latentdiff.formats.single_file import save_single

    save_single(path, _vae(nouns), _unet(nouns), _tower(nouns), schedule, dtype)


def _vae(nouns: Nouns) -> "VAE":
    return cast(Any, nouns.autoencoder.module)


def _unet(nouns: Nouns) -> "UNet":
    return cast(Any, nouns.network.module)


def _tower(nouns: Nouns) -> TextTower:
    assert isinstance(nouns.conditioner, TextConditioner)
    return nouns.conditioner.tower


def _index(nouns: Nouns, schedule: Config) -> Config:
    """The folders' contents; it names a pipeline of diffusers only where that draws the same."""
    from importlib.metadata import version

    from latentdiff.formats.diffusers_save import config_of, drawn_by_diffusers, transformers_name

    vae, text = _vae(nouns), _tower(nouns)
    kind = nouns.network.kind
    known = isinstance(text, ClipTower) and drawn_by_diffusers(vae, _unet(nouns), schedule)
    known &= kind != "inpainting" or nouns.autoencoder.channels == 4  # all that it takes
    return {
        "_class_name": _PIPELINES[kind] if known else "LatentDiffusionPipeline",
        "_diffusers_version": version("diffusers"),
        "vae": ["diffusers", config_of(vae)["_class_name"]],
        "unet": ["diffusers", config_of(_unet(nouns))["_class_name"]],
        "text_encoder": ["transformers", transformers_name(text.model)],
        "tokenizer": ["transformers", transformers_name(text.tokenizer)],
        "scheduler": ["diffusers", str(schedule["_class_name"])],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }

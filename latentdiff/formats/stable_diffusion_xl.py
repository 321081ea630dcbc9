"""Stable Diffusion XL: base, refiner, inpainting, InstructPix2Pix, and what is distilled of it."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from latentdiff.errors import UserError
from latentdiff.formats import scheduler_config
from latentdiff.formats.families import Choices, Config, Nouns, Opened, Weights
from latentdiff.formats.scheduler_config import Described
from latentdiff.formats.single_file_configs import XL_SCALE
from latentdiff.formats.weights import blaming, read_json
from latentdiff.models.haar import autoencoder_of
from latentdiff.models.joined_conditioner import JoinedConditioner
from latentdiff.models.network import Kind, SizedUNet
from latentdiff.models.text_encoders import PenultimateTower

if TYPE_CHECKING:
    from latentdiff.formats.diffusers_folder import VAE, UNet
    from latentdiff.formats.weights import WeightFiles

# Parts of other families, and of pipelines that draw with more than a model.
_FOREIGN = ("text_encoder_3", "transformer", "prior")
_BESIDE = ("image_encoder", "controlnet", "adapter")
_NOTHING = (None, [None, None])
_PIPELINES: dict[Kind, str] = {
    "text-to-image": "StableDiffusionXLPipeline",
    "inpainting": "StableDiffusionXLInpaintPipeline",
    "instruct-pix2pix": "StableDiffusionXLInstructPix2PixPipeline",
}
_REFINER = "StableDiffusionXLImg2ImgPipeline"


def claims_folder(index: Mapping[str, object]) -> bool:
    """True where a second text encoder stands beside a U-Net, and no part of another family."""
    there = all(index.get(part) not in _NOTHING for part in ("text_encoder_2", "unet"))
    return there and all(index.get(part) in _NOTHING for part in _FOREIGN)


def claims_file(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True where the file holds text encoders, or a U-Net, under their names in Stable Diffusion
    XL."""
    from latentdiff.formats.single_file_xl import claims

    return claims(shapes)


def open_folder(folder: Path, choices: Choices) -> Opened:
    """See `Family.open_folder`."""
    from latentdiff.formats import diffusers_folder as parts
    from latentdiff.formats.autoencoder_files import open_autoencoder

    path = folder / "model_index.json"
    index = read_json(path)
    zero_empty, aesthetic, edit = (
        _switch(index, path, *switch)
        for switch in (
            ("force_zeros_for_empty_prompt", True),
            ("requires_aesthetics_score", False),
            ("is_cosxl_edit", False),
        )
    )
    if edit:
        raise UserError(f"{path}: is_cosxl_edit: such a model does not load here.")
    for part in _BESIDE:
        if index.get(part) not in _NOTHING:
            raise UserError(
                f"{path}: it has a part {part}, beside a model of Stable Diffusion XL; take that "
                "part out of it, and give it to the call."
            )
    variant = choices.variant
    if variant is not None:
        parts.check_variant(folder, variant)
    unet = parts.unet(folder / "unet", variant)
    if choices.vae is None:
        vae = parts.vae(folder / "vae", variant)
    else:
        vae = open_autoencoder(choices.vae, XL_SCALE)
    texts: dict[str, tuple[PenultimateTower, WeightFiles]] = {}
    if index.get("text_encoder") not in _NOTHING:
        texts["text_encoder"] = parts.penultimate(
            folder / "text_encoder", folder / "tokenizer", variant, projection=False
        )
    texts["text_encoder_2"] = parts.penultimate(
        folder / "text_encoder_2", folder / "tokenizer_2", variant, projection=True
    )
    described = scheduler_config.read_folder(folder)
    with blaming(folder):
        return _opened(unet, vae, texts, described, zero_empty=zero_empty, aesthetic=aesthetic)


def _switch(index: Mapping[str, object], path: Path, key: str, default: bool) -> bool:
    value = index.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key} is {value!r:.40}; it must be true or false.")
    return value


def open_file(file: Path, choices: Choices) -> Opened:
    """See `Family.open_file`."""
    from latentdiff.formats.autoencoder_files import open_autoencoder
    from latentdiff.formats.single_file_xl import open_xl

    if choices.variant is not None:
        raise UserError(
            f"{file}: a single file has no variants; only the weights of a folder have."
        )
    single = open_xl(file, choices.vae is None)
    vae = single.vae if choices.vae is None else open_autoencoder(choices.vae, XL_SCALE)
    assert vae is not None
    described = scheduler_config.read(single.schedule, f"{file}: scheduler")
    switches = {"zero_empty": single.zero_empty, "aesthetic": single.aesthetic}
    with blaming(file):
        return _opened(single.unet, vae, single.texts, described, **switches)


def _opened(
    unet: "tuple[UNet, WeightFiles]",
    vae: "tuple[VAE, WeightFiles]",
    texts: "Mapping[str, tuple[PenultimateTower, WeightFiles]]",
    described: Described,
    *,
    zero_empty: bool,
    aesthetic: bool,
) -> Opened:
    autoencoder = autoencoder_of(vae[0])
    network = SizedUNet(unet[0], autoencoder.channels)
    towers = {name: tower for name, (tower, _) in texts.items()}
    conditioner = JoinedConditioner(towers, zero_empty, aesthetic)
    network.check_told(conditioner.pooled_width, 5 if aesthetic else 6)
    weights = [
        Weights(unet[0], unet[1], steady=False),
        Weights(vae[0], vae[1], steady=bool(vae[0].config.get("force_upcast", True))),
        *(Weights(tower.model, files, steady=False) for tower, files in texts.values()),
    ]
    return Opened(Nouns(autoencoder, conditioner, network), weights, described)


def write_folder(stage: Path, nouns: Nouns, schedule: Config, dtype: torch.dtype | None) -> None:
    """See `Family.write_folder`. A latent mean is folded into the autoencoder's convolutions."""
    from latentdiff.formats.diffusers_save import (
        save_diffusers,
        save_text,
        without_offset,
        write_config,
    )

    vae = without_offset(cast(Any, nouns.autoencoder.module))
    unet: Any = nouns.network.module
    save_diffusers(vae, stage / "vae", dtype)
    save_diffusers(unet, stage / "unet", dtype)
    conditioner = _conditioner(nouns)
    for name, tower in conditioner.towers.items():
        save_text(tower, stage, dtype, name.removeprefix("text_encoder"))
    nouns = Nouns(autoencoder_of(vae), conditioner, nouns.network)
    write_config(_index(nouns, schedule), stage / "model_index.json")


def write_file(path: Path, nouns: Nouns, schedule: Config, dtype: torch.dtype | None) -> None:
    """See `Family.write_file`."""
    from latentdiff.formats.single_file_xl import save_xl

    conditioner = _conditioner(nouns)
    vae: Any = nouns.autoencoder.module
    unet: Any = nouns.network.module
    switches = {"zero_empty": conditioner.zero_empty, "aesthetic": conditioner.aesthetic}
    save_xl(path, vae, unet, conditioner.towers, schedule, dtype, **switches)


def _conditioner(nouns: Nouns) -> JoinedConditioner:
    assert isinstance(nouns.conditioner, JoinedConditioner)
    return nouns.conditioner


def _index(nouns: Nouns, schedule: Config) -> Config:
    """The folders' contents; it names a pipeline of diffusers only where that draws the same."""
    from latentdiff.formats.diffusers_save import config_of, drawn_by_diffusers, transformers_name

    vae: Any = nouns.autoencoder.module
    unet: Any = nouns.network.module
    kind, conditioner = nouns.network.kind, _conditioner(nouns)
    name = _REFINER if conditioner.aesthetic and kind == "text-to-image" else _PIPELINES[kind]
    known = drawn_by_diffusers(vae, unet, schedule)
    known &= kind != "inpainting" or nouns.autoencoder.channels == 4  # all that it takes
    index: Config = {
        "_class_name": name if known else "LatentDiffusionPipeline",
        "_diffusers_version": version("diffusers"),
        "vae": ["diffusers", config_of(vae)["_class_name"]],
        "unet": ["diffusers", config_of(unet)["_class_name"]],
        "scheduler": ["diffusers", str(schedule["_class_name"])],
        "force_zeros_for_empty_prompt": conditioner.zero_empty,
    }
    if name not in (_PIPELINES["text-to-image"], _PIPELINES["instruct-pix2pix"]):
        index["requires_aesthetics_score"] = conditioner.aesthetic
    for suffix in ("", "_2"):
        tower = conditioner.towers.get(f"text_encoder{suffix}")
        parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
        if tower is not None:
            parts = {"text_encoder": tower.model, "tokenizer": tower.tokenizer}
        for part, value in parts.items():
            told = [None, None] if value is None else ["transformers", transformers_name(value)]
            index[f"{part}{suffix}"] = told
    return index

"""PixArt-alpha and PixArt-Sigma: a transformer, a T5 encoder, an autoencoder."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from latentdiff.errors import UserError
from latentdiff.formats import scheduler_config
from latentdiff.formats.families import Choices, Config, Nouns, Opened, Weights
from latentdiff.formats.single_file_configs import XL_SCALE
from latentdiff.formats.weights import WeightFiles, blaming, build, read_json, weight_files
from latentdiff.models.haar import autoencoder_of
from latentdiff.models.pixart import PixArtConditioner, PixArtNetwork
from latentdiff.models.pixart_transformer import PixArtTransformer
from latentdiff.models.text_encoders import T5Tower

if TYPE_CHECKING:
    from latentdiff.formats.diffusers_folder import VAE

_NOTHING = (None, [None, None])
# Parts of other families, and of pipelines that draw with more than a model.
_FOREIGN = ("unet", "text_encoder_2", "controlnet", "image_encoder", "prior")
# As which it was published before diffusers had a class of its own for it.
_FORMER = "Transformer2DModel"
_SIGMA, _ALPHA = "PixArtSigmaPipeline", "PixArtAlphaPipeline"
# The most tokens of a prompt that these pipelines read, whatever the tokenizer says.
_WINDOWS = {_ALPHA: 120, _SIGMA: 300}
_WINDOW = "prompt_window"  # of a model that neither of them draws
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("attention_bias", "upcast_attention", "use_additional_conditions"), bool),
    "norm_eps": float,
    "interpolation_scale": float | None,  # 0.5 in Sigmas of 256 pixels
}
_SIZES = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size")
_SIZES += ("patch_size", "norm_num_groups", "cross_attention_dim", "num_embeds_ada_norm")
_SIZES_OR_NONE = ("out_channels", "caption_channels")


def claims_folder(index: Mapping[str, object]) -> bool:
    """True where the model has a transformer of PixArt's."""
    part = index.get("transformer")
    named = part[-1] if isinstance(part, list) and part else None
    return named in (PixArtTransformer.diffusers_name, _FORMER)


def claims_file(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True for the names of PixArt's own training code."""
    return any(name.endswith("t_block.1.weight") for name in shapes)


def open_folder(folder: Path, choices: Choices) -> Opened:
    """See `Family.open_folder`."""
    from latentdiff.formats import diffusers_folder as parts
    from latentdiff.formats.autoencoder_files import open_autoencoder

    path = folder / "model_index.json"
    index = read_json(path)
    for part in _FOREIGN:
        if index.get(part) not in _NOTHING:
            raise UserError(f"{path}: it has a part {part}; a model of PixArt has none.")
    sigma = str(index.get("_class_name")).startswith("PixArtSigma")
    window = index.get(_WINDOW, _WINDOWS[_SIGMA if sigma else _ALPHA])
    if not isinstance(window, int) or not 2 <= window <= 4096:
        raise UserError(f"{path}: {_WINDOW} is {window!r:.40}; it must be 2 .. 4096.")
    variant = choices.variant
    if variant is not None:
        parts.check_variant(folder, variant)
    module, files = transformer(folder / "transformer", variant)
    if choices.vae is None:
        vae = parts.vae(folder / "vae", variant)
    else:
        vae = open_autoencoder(choices.vae, published_scale(_WINDOWS[_SIGMA if sigma else _ALPHA]))
    text, text_files = parts.text(folder / "text_encoder", folder / "tokenizer", variant)
    if not isinstance(text, T5Tower):
        raise UserError(f"{folder / 'text_encoder'}: PixArt reads the states of a T5 encoder.")
    described = scheduler_config.read_folder(folder)
    with blaming(folder):
        autoencoder = autoencoder_of(vae[0])
        network = PixArtNetwork(module, autoencoder.channels)
        tower = T5Tower(text.model, text.tokenizer, window)
        conditioner = PixArtConditioner(tower, module.told_sizes)
    weights = [
        Weights(module, files, steady=False),
        Weights(vae[0], vae[1], steady=True),
        Weights(text.model, text_files, steady=True),
    ]
    return Opened(Nouns(autoencoder, conditioner, network), weights, described)


def published_scale(window: int) -> float:
    """The scale of the latents of the published models that read so many tokens: Sigma's is that of
    Stable Diffusion XL, alpha's that of Stable Diffusion 1."""
    return XL_SCALE if window == _WINDOWS[_SIGMA] else 0.18215


def transformer(folder: Path, variant: str | None) -> tuple[PixArtTransformer, WeightFiles]:
    """The transformer of a folder, without memory yet, and its weights.

    Raises:
        UserError: missing, damaged, or not what its config says; or it is another transformer.
    """
    from latentdiff.formats.config_values import check_above_zero, check_types
    from latentdiff.formats.diffusers_folder import read_config

    path = folder / "config.json"
    config = read_config(path)
    files = WeightFiles(weight_files(folder, "diffusion_pytorch_model", variant))
    kind = config.get("_class_name")
    if kind not in (PixArtTransformer.diffusers_name, _FORMER):
        raise UserError(f"{path}: it describes {kind!s:.60}, and no transformer of PixArt.")
    if kind == _FORMER and "norm_type" not in config:
        raise UserError(f"{path}: its norm_type is not ada_norm_single, as PixArt's.")
    sizes = dict.fromkeys(_SIZES, int) | dict.fromkeys(_SIZES_OR_NONE, int | None)
    check_types(config, {**_TYPES, **sizes}, str(path))
    check_above_zero(config, (*sizes, "interpolation_scale"), str(path))
    if odd := PixArtTransformer.odd(config):
        raise UserError(f"{path}: its {odd} is {config[odd]!r:.40}, of another transformer.")
    layers = config.get("num_layers", 28)
    return build(lambda: PixArtTransformer(config), str(path), files, layers), files


def open_file(file: Path, choices: Choices) -> Opened:
    """See `Family.open_file`.

    Raises:
        UserError: always, for such a file holds the transformer alone.
    """
    raise UserError(
        f"{file}: it holds the transformer of PixArt in the names of its training code, without "
        "text encoder and autoencoder; get the model as a folder in the diffusers layout."
    )


def write_folder(stage: Path, nouns: Nouns, schedule: Config, dtype: torch.dtype | None) -> None:
    """See `Family.write_folder`. A latent mean is folded into the autoencoder's convolutions."""
    from latentdiff.formats.diffusers_save import (
        save_diffusers,
        save_text,
        without_offset,
        write_config,
    )

    vae = without_offset(cast(Any, nouns.autoencoder.module))
    save_diffusers(vae, stage / "vae", dtype)
    save_diffusers(_network(nouns).module, stage / "transformer", dtype)
    save_text(_conditioner(nouns).tower, stage, dtype)
    write_config(_index(vae, nouns, schedule), stage / "model_index.json")


def write_file(path: Path, nouns: Nouns, schedule: Config, dtype: torch.dtype | None) -> None:
    """See `Family.write_file`.

    Raises:
        UserError: always, for nothing reads a whole model of PixArt in a single file.
    """
    raise UserError(f"{path}: no single file holds a model of PixArt; name a folder.")


def _network(nouns: Nouns) -> PixArtNetwork:
    assert isinstance(nouns.network, PixArtNetwork)
    return nouns.network


def _conditioner(nouns: Nouns) -> PixArtConditioner:
    assert isinstance(nouns.conditioner, PixArtConditioner)
    return nouns.conditioner


def _index(vae: "VAE", nouns: Nouns, schedule: Config) -> Config:
    """The folders' contents; it names a pipeline of diffusers only where that draws the same."""
    from latentdiff.formats.diffusers_save import config_of, drawn_by_diffusers, transformers_name

    module, tower = _network(nouns).module, _conditioner(nouns).tower
    named = next((name for name, window in _WINDOWS.items() if window == tower.window), None)
    # What diffusers' pipelines tell sizes: of alpha, and of this many latents, alone.
    fits = not module.told_sizes or (named == _ALPHA and module.config["sample_size"] == 128)
    known = named is not None and fits and drawn_by_diffusers(vae, module, schedule)
    index: Config = {
        "_class_name": named if known else "LatentDiffusionPipeline",
        "_diffusers_version": version("diffusers"),
        "vae": ["diffusers", config_of(vae)["_class_name"]],
        "transformer": ["diffusers", PixArtTransformer.diffusers_name],
        "text_encoder": ["transformers", transformers_name(tower.model)],
        "tokenizer": ["transformers", transformers_name(tower.tokenizer)],
        "scheduler": ["diffusers", str(schedule["_class_name"])],
    }
    return index if known else index | {_WINDOW: tower.window}

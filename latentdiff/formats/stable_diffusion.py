"""Stable Diffusion 1 and 2, and models of their shape: U-Net, autoencoder, one text encoder."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from latentdiff.diffusion.process import DiscreteVP
from latentdiff.errors import UserError
from latentdiff.formats import scheduler_config
from latentdiff.formats.families import Choices, Config, Nouns, Opened, Weights
from latentdiff.formats.scheduler_config import Described
from latentdiff.formats.weights import blaming, read_json
from latentdiff.models.conditioner import TextConditioner
from latentdiff.models.haar import HaarTransform, autoencoder_of
from latentdiff.models.network import DiffusersUNet, Kind, LowResolution, UpscalingUNet
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
    "upscaling": "StableDiffusionUpscalePipeline",
}
_NOTHING = (None, [None, None])
# StableDiffusionUpscalePipeline sets this scale, whatever the files say.
_UPSCALING_SCALE = 0.08333
_MOST_LEVEL = 350  # that pipeline's own default
_RATIO, _RESIDUAL = "latentdiff_ratio", "latentdiff_residual"
# The keys of low_res_scheduler that say how noise is added: nothing else is done with it.
_NOISING = ("_class_name", "_use_default_values", "num_train_timesteps", "trained_betas")
_NOISING += ("beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr")


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
        network: Callable[..., DiffusersUNet] = DiffusersUNet
        if index.get("low_res_scheduler") not in _NOTHING:
            made = _low_resolution(folder, index, autoencoder_of(vae).factor)
            network = partial(UpscalingUNet, made=made)
            named = index.get("_class_name") == _PIPELINES["upscaling"]
            if named and not isinstance(vae, HaarTransform):
                kl: Any = vae
                kl.register_to_config(scaling_factor=_UPSCALING_SCALE)
        return _opened((unet, unet_files), (vae, vae_files), (text, text_files), described, network)


def _low_resolution(folder: Path, index: Mapping[str, object], factor: int) -> LowResolution:
    """Read what the files of an upscaling model say of the small pictures that it enlarges.

    Raises:
        UserError: a value that does not work here.
    """
    path = folder / "low_res_scheduler" / "scheduler_config.json"
    config = read_json(path)
    told = {key: value for key, value in config.items() if key in _NOISING}
    told["clip_sample"] = False  # of its steps, of which none is made
    process = scheduler_config.read(told, str(path), pipeline="")[0]
    if not isinstance(process, DiscreteVP):
        raise UserError(f"{path}: its times must be whole, as those of DDPMScheduler are.")
    levels = process.num_train_timesteps
    most = _whole(index, "max_noise_level", _MOST_LEVEL, 0, levels - 1)
    ratio = _whole(index, _RATIO, factor, max(factor, 2), 64)
    if ratio % factor:
        raise UserError(f"{_RATIO} must be a multiple of {factor}, the vae's factor, not {ratio}.")
    residual = index.get(_RESIDUAL, False)
    if not isinstance(residual, bool):
        raise UserError(f"{_RESIDUAL} must be true or false, not {residual!r:.40}.")
    return LowResolution(process, most, ratio, residual)


def _whole(index: Mapping[str, object], key: str, default: int, low: int, high: int) -> int:
    value = index.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{key} must be a whole number from {low} to {high}, not {value!r:.40}.")
    return value


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
    network_of: Callable[..., DiffusersUNet] = DiffusersUNet,
) -> Opened:
    autoencoder = autoencoder_of(vae[0])
    network = network_of(unet[0], autoencoder.channels)
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
    nouns = Nouns(autoencoder_of(vae), nouns.conditioner, nouns.network)
    save_diffusers(vae, stage / "vae", dtype)
    save_diffusers(_unet(nouns), stage / "unet", dtype)
    save_text(_tower(nouns), stage, dtype)
    index = _index(nouns, schedule)
    if (low := nouns.network.low_resolution) is not None:
        own = scheduler_config.read({"_class_name": "DDPMScheduler", "clip_sample": False}, "")[2:]
        noising = scheduler_config.write(low.process, "eps", *own)
        write_config(noising, stage / "low_res_scheduler" / "scheduler_config.json")
        del index["requires_safety_checker"]  # which that pipeline does not know
        index["low_res_scheduler"] = ["diffusers", "DDPMScheduler"]
        index["max_noise_level"] = low.max_noise_level
        if low.ratio != nouns.autoencoder.factor:
            index[_RATIO] = low.ratio
        if low.residual:
            index[_RESIDUAL] = True
    write_config(index, stage / "model_index.json")


def write_file(path: Path, nouns: Nouns, schedule: Config, dtype: torch.dtype | None) -> None:
    """See `Family.write_file`."""
    from latentdiff.formats.single_file import save_single

    if nouns.network.kind == "upscaling":
        raise UserError(f"{path}: an upscaling model is saved as a folder; name one.")
    if isinstance(nouns.autoencoder.module, HaarTransform):
        raise UserError(f"{path}: a model of pixels is saved as a folder; name one.")
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
    pixels = isinstance(vae, HaarTransform)
    known = isinstance(text, ClipTower) and drawn_by_diffusers(vae, _unet(nouns), schedule)
    if nouns.network.low_resolution is not None:
        known &= nouns.autoencoder.scaling_factor == _UPSCALING_SCALE
        known &= nouns.network.low_resolution.ratio == nouns.autoencoder.factor
        known &= not nouns.network.low_resolution.residual
    known &= kind != "inpainting" or nouns.autoencoder.channels == 4  # all that it takes
    return {
        "_class_name": _PIPELINES[kind] if known else "LatentDiffusionPipeline",
        "_diffusers_version": version("diffusers"),
        "vae": ["latentdiff" if pixels else "diffusers", config_of(vae)["_class_name"]],
        "unet": ["diffusers", config_of(_unet(nouns))["_class_name"]],
        "text_encoder": ["transformers", transformers_name(text.model)],
        "tokenizer": ["transformers", transformers_name(text.tokenizer)],
        "scheduler": ["diffusers", str(schedule["_class_name"])],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }

"""Writing a model folder: all of it, or none."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentdiff.errors import UserError
from latentdiff.files import make_folder, writing_folder
from latentdiff.formats.check import Kind, kind_of, latent_affine, latent_channels
from latentdiff.formats.weights import may_replace, read_json, save_weights
from latentdiff.models.text_encoders import ClipTower, TextTower

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


_PIPELINES: dict[Kind, str] = {
    "text-to-image": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "instruct-pix2pix": "StableDiffusionInstructPix2PixPipeline",
}


def save_folder(
    folder: Path,
    vae: "AutoencoderKL | VQModel",
    unet: "UNet2DConditionModel",
    text: TextTower,
    schedule: dict[str, object],
    dtype: torch.dtype | None,
) -> Path:
    """Write the parts of a model; see `Bundle.save`.

    Raises:
        UserError: the folder cannot be written, or holds something that is no model.
    """
    with writing_model(folder, "model_index.json") as stage:
        vae = without_offset(vae)
        _save_diffusers(vae, stage / "vae", dtype)
        _save_diffusers(unet, stage / "unet", dtype)
        _save_text(text, stage, dtype)
        write_config(schedule, stage / "scheduler" / "scheduler_config.json")
        write_config(_index(vae, unet, text, schedule), stage / "model_index.json")
    return folder


def save_network(network: "AutoencoderKL | VQModel", folder: Path) -> None:
    """Write one network as diffusers lays it out: all of it, or nothing.

    Raises:
        UserError: the folder cannot be written, a weight is not finite, or something else is there.
    """
    with writing_model(folder, "config.json") as stage:
        _save_diffusers(network, stage, None)


def write_config(value: dict[str, object], stage: Path) -> None:
    """Write a JSON file into a folder that is staged, as the other configs there are."""
    stage.parent.mkdir(exist_ok=True)
    stage.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


@contextmanager
def writing_model(folder: Path, config: str) -> Iterator[Path]:
    """Write a folder in the layout of diffusers or transformers; see `files.writing_folder`.

    Another one that is there already is replaced, and folders above it are made.

    Args:
        config: the JSON file that tells one: `model_index.json` of a whole model, `config.json` of
            one network.

    Raises:
        UserError: it cannot be written, or something else is there.
    """

    def recognise(folder: Path) -> None:
        if not {"_class_name", "model_type"} & read_json(folder / config).keys():
            raise UserError(f"{folder / config}: it names no class.")

    kind = "a model folder" if config == "model_index.json" else "the folder of a network"
    empty = folder.is_dir() and not any(folder.iterdir())
    replace = not empty and may_replace(folder, kind, recognise)
    make_folder(folder.parent)
    with writing_folder(folder, replace=replace) as stage:
        yield stage


def _save_diffusers(
    network: "AutoencoderKL | VQModel | UNet2DConditionModel",
    stage: Path,
    dtype: torch.dtype | None,
) -> None:
    network.save_config(stage)
    save_weights(network.state_dict(), stage / "diffusion_pytorch_model.safetensors", dtype)


def _save_text(text: TextTower, stage: Path, dtype: torch.dtype | None) -> None:
    config = copy.deepcopy(text.model.config)
    config.architectures = [type(text.model).__name__]
    config.save_pretrained(stage / "text_encoder")
    values = dict(text.model.state_dict())
    if isinstance(text, ClipTower):  # the name under which everything but transformers 5 looks
        values = {f"text_model.{name}": value for name, value in values.items()}
    else:
        values.pop("encoder.embed_tokens.weight")  # the same tensor as shared.weight
    save_weights(values, stage / "text_encoder" / "model.safetensors", dtype)
    text.tokenizer.save_pretrained(stage / "tokenizer")
    if isinstance(text, ClipTower):  # vocab.json and merges.txt, for transformers 4
        text.tokenizer.backend_tokenizer.model.save(str(stage / "tokenizer"))


def _index(
    vae: "AutoencoderKL | VQModel",
    unet: "UNet2DConditionModel",
    text: TextTower,
    schedule: dict[str, object],
) -> dict[str, object]:
    """What each folder holds; it names a pipeline of diffusers only where that draws the same."""
    from diffusers import __version__

    kind = kind_of(vae, unet)
    known = isinstance(text, ClipTower) and type(vae).__name__ == "AutoencoderKL"
    known &= not bool(latent_affine(vae)[1].any())
    known &= schedule.get("prediction_type") in ("epsilon", "sample", "v_prediction")
    known &= "variance_type" not in schedule or schedule["_class_name"] == "DDPMScheduler"
    known &= "beta_schedule" in schedule or "trained_betas" in schedule
    known &= kind != "inpainting" or latent_channels(vae) == 4  # all that it takes
    return {
        "_class_name": _PIPELINES[kind] if known else "LatentDiffusionPipeline",
        "_diffusers_version": __version__,
        "vae": ["diffusers", type(vae).__name__],
        "unet": ["diffusers", type(unet).__name__],
        "text_encoder": ["transformers", type(text.model).__name__],
        "tokenizer": ["transformers", type(text.tokenizer).__name__],
        "scheduler": ["diffusers", str(schedule["_class_name"])],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }


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

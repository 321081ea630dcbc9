"""Writing a model folder: all of it, or none."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentdiff.errors import UserError
from latentdiff.files import make_folder, writing_folder
from latentdiff.formats.weights import may_replace, read_json, save_weights
from latentdiff.models.autoencoder import latent_affine, latent_channels
from latentdiff.models.clip_text import ClipTextEncoder
from latentdiff.models.clip_tokenizer import in_transformers
from latentdiff.models.cross_attention_unet import CrossAttentionUNet, Encoder
from latentdiff.models.haar import HaarTransform
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.pixart_transformer import PixArtTransformer
from latentdiff.models.t5_text import T5TextEncoder
from latentdiff.models.text_encoders import ClipTower, TextTower
from latentdiff.models.tiny_autoencoder import TinyAutoencoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from latentdiff.formats.diffusers_folder import VAE, UNet


def save_network(network: "VAE", folder: Path) -> None:
    """Write one network as diffusers lays it out: all of it, or nothing.

    Raises:
        UserError: the folder cannot be written, a weight is not finite, or something else is there.
    """
    with writing_model(folder, "config.json") as stage:
        save_diffusers(network, stage, None)


def write_config(value: dict[str, object], stage: Path) -> None:
    """Write a JSON file into a folder that is staged, as the other configs there are."""
    stage.parent.mkdir(parents=True, exist_ok=True)
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


def config_of(network: "VAE | UNet | Encoder | PixArtTransformer") -> dict[str, Any]:
    """The config of a network or autoencoder as diffusers writes it, ours or theirs."""
    if isinstance(
        network, Encoder | KLAutoencoder | TinyAutoencoder | HaarTransform | PixArtTransformer
    ):
        names = {"_class_name": network.diffusers_name, "_diffusers_version": version("diffusers")}
        return dict(sorted({**network.config, **names}.items()))
    return json.loads(network.to_json_string())


def text_config_of(network: Any) -> "PreTrainedConfig":
    """A copy of the config of a text encoder, as an object of transformers."""
    if isinstance(network, ClipTextEncoder):
        from transformers.models.clip.configuration_clip import CLIPTextConfig

        return CLIPTextConfig(**vars(network.config))
    if isinstance(network, T5TextEncoder):
        from transformers.models.t5.configuration_t5 import T5Config

        derived = ("dense_act_fn", "is_gated_act")  # which beat feed_forward_proj where they are
        told: dict[str, Any] = vars(network.config)
        told = {k: v for k, v in told.items() if v is not None or k not in derived}
        return T5Config(**told)
    return copy.deepcopy(network.config)


def save_diffusers(
    network: "VAE | UNet | Encoder | PixArtTransformer", stage: Path, dtype: torch.dtype | None
) -> None:
    """Write a network or autoencoder, config and weights, into a folder that is staged.

    Raises:
        UserError: a weight is not finite in that precision.
    """
    write_config(config_of(network), stage / "config.json")
    save_weights(network.state_dict(), stage / "diffusion_pytorch_model.safetensors", dtype)


def save_text(text: TextTower, stage: Path, dtype: torch.dtype | None, suffix: str = "") -> None:
    """Write a text encoder and its tokenizer into a folder that is staged.

    Args:
        text: the encoder with its tokenizer.
        stage: of the whole model.
        dtype: of the weights; None keeps what they are.
        suffix: of the two folders' names, as "_2" of the second of a model.

    Raises:
        UserError: a weight is not finite in that precision.
    """
    config = text_config_of(text.model)
    config.architectures = [transformers_name(text.model)]
    config.dtype = torch.float32  # transformers takes the file's; diffusers, this, as for the rest
    config.save_pretrained(stage / f"text_encoder{suffix}")
    values = dict(text.model.state_dict())
    if isinstance(text, ClipTower):  # the name under which everything but transformers 5 looks
        alone = "text_projection."  # stands outside of it
        values = {n if n.startswith(alone) else f"text_model.{n}": v for n, v in values.items()}
    else:
        values.pop("encoder.embed_tokens.weight")  # the same tensor as shared.weight
    save_weights(values, stage / f"text_encoder{suffix}" / "model.safetensors", dtype)
    save_tokenizer(text.tokenizer, stage / f"tokenizer{suffix}")
    if isinstance(text, ClipTower):  # vocab.json and merges.txt, for transformers 4
        text.tokenizer.backend_tokenizer.model.save(str(stage / f"tokenizer{suffix}"))


def save_tokenizer(tokenizer: Any, stage: Path) -> None:
    """Write tokenizer.json and its config into a folder that is staged."""
    in_transformers(tokenizer).save_pretrained(stage)


def transformers_name(part: Any) -> str:
    """The name in transformers of the class of a text encoder or a tokenizer."""
    return getattr(part, "transformers_name", type(part).__name__)


def is_kl(vae: "VAE") -> bool:
    """True for a KL autoencoder, ours or that of diffusers."""
    return config_of(vae)["_class_name"] == KLAutoencoder.diffusers_name


def drawn_by_diffusers(
    vae: "VAE", network: "UNet | PixArtTransformer", schedule: dict[str, Any]
) -> bool:
    """True where a pipeline of diffusers draws as here with this autoencoder, network, schedule."""
    if isinstance(vae, HaarTransform):
        return False
    known = is_kl(vae) or isinstance(vae, TinyAutoencoder)
    named = (CrossAttentionUNet.diffusers_name, PixArtTransformer.diffusers_name)
    known &= config_of(network)["_class_name"] in named
    known &= not bool(latent_affine(vae)[1].any())
    known &= schedule.get("prediction_type") in ("epsilon", "sample", "v_prediction")
    known &= "variance_type" not in schedule or schedule["_class_name"] == "DDPMScheduler"
    return known and ("beta_schedule" in schedule or "trained_betas" in schedule)


def without_offset(vae: "VAE") -> "VAE":
    """The same autoencoder, with any latent mean folded into its 1x1 convolutions."""
    from latentdiff.models.vae import standardise_latents

    if (
        isinstance(vae, HaarTransform)
        or not is_kl(vae)
        or not (vae.quant_conv and vae.post_quant_conv)
    ):
        return vae
    if not (vae.config["shift_factor"] or vae.config["latents_mean"]):
        return vae
    gain, offset = (part.flatten().expand(latent_channels(vae)) for part in latent_affine(vae))
    folded: Any = copy.deepcopy(vae).requires_grad_(False)
    folded.to(torch.float32)
    weight = next(vae.parameters())
    std = (gain * vae.config["scaling_factor"]).to(weight.device)
    standardise_latents(folded, offset.to(weight.device), std)
    folded.register_to_config(shift_factor=None, latents_mean=None, latents_std=None)
    return folded.to(weight.dtype)

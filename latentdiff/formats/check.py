"""Whether the parts of a model fit each other."""

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.models.text_encoders import TextTower

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

Kind = Literal["text-to-image", "inpainting", "instruct-pix2pix"]
"""What a U-Net sees: x_t; x_t, a mask and the masked picture; or x_t and the picture to change."""

# What it must be given at a run, and what a user does about it.
_NEEDS: dict[Kind, str] = {
    "text-to-image": "this model sees x_t alone: use RePaint or Blend in place of Inpaint, and "
    "SDEdit in place of Instruct.",
    "inpainting": "this is an inpainting model: it needs edits=[Inpaint(image, mask)], which is "
    "`latentdiff inpaint`.",
    "instruct-pix2pix": "this is an InstructPix2Pix model: it needs edits=[Instruct(image)], which "
    "is `latentdiff edit`.",
}

# What a U-Net may be told that no prompt says: sizes, classes, pictures, poses.
_EXTRA_INPUTS = ("addition_embed_type", "class_embed_type", "num_class_embeds")


def check_parts(
    vae: "AutoencoderKL | VQModel", unet: "UNet2DConditionModel", text: TextTower
) -> None:
    """Pass if latents and text states mean the same to all three.

    Raises:
        UserError: they do not, or the U-Net needs more than latents, time and text.
    """
    channels = latent_channels(vae)
    inside, outside = unet.config["in_channels"], unet.config["out_channels"]
    if inside not in _kinds(channels) or outside not in (channels, 2 * channels):
        raise UserError(
            f"unet: it takes {inside} and gives {outside} channels, but the vae's latents have "
            f"{channels}; depth, upscaling and such checkpoints do not work here."
        )
    for key in _EXTRA_INPUTS:
        if unet.config[key] is not None:
            raise UserError(
                f"unet: its {key} is {unet.config[key]!s:.40}, as in Stable Diffusion XL and "
                "others that need more than a prompt; they do not work here."
            )
    width = _text_width(unet)
    if width != text.width:
        raise UserError(
            f"unet: it attends to text states of width {width}, but the text encoder's have "
            f"{text.width}."
        )
    sides = _each(unet.config["sample_size"])
    if len(sides) > 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError("unet: its sample_size does not say how large its pictures are.")
    check_vae(vae)
    shifted = (vae.config.get(key) for key in ("shift_factor", "latents_mean", "latents_std"))
    if kind_of(vae, unet) == "instruct-pix2pix" and any(shifted):
        raise UserError(
            "vae: it has a shift_factor, latents_mean or latents_std, and so nothing says which "
            "numbers its InstructPix2Pix U-Net was shown; such a pair does not work here."
        )


def check_vae(vae: "AutoencoderKL | VQModel") -> None:
    """Pass an autoencoder of RGB pictures whose latents have a sound scale.

    Raises:
        UserError: it is none.
    """
    if (vae.config["in_channels"], vae.config["out_channels"]) != (3, 3):
        raise UserError("vae: it is not for RGB pictures of 3 channels.")
    latent_affine(vae)


def _text_width(unet: "UNet2DConditionModel") -> object:
    kind = unet.config["encoder_hid_dim_type"]
    if kind == "text_proj":
        return unet.config["encoder_hid_dim"]
    if kind is not None:
        raise UserError(f"unet: its encoder_hid_dim_type '{kind!s:.40}' does not work here.")
    widths = _each(unet.config["cross_attention_dim"])
    return widths[0] if all(width == widths[0] for width in widths) else widths


def _each(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _kinds(channels: int) -> dict[int, Kind]:
    """By the number of input channels, where latents have so many."""
    return {
        channels: "text-to-image",
        2 * channels + 1: "inpainting",
        2 * channels: "instruct-pix2pix",
    }


def kind_of(vae: "AutoencoderKL | VQModel", unet: "UNet2DConditionModel") -> Kind:
    """What the U-Net of parts that fit sees."""
    return _kinds(latent_channels(vae))[unet.config["in_channels"]]


def check_input(kind: Kind, wanted: int, given: int) -> None:
    """Pass if a U-Net is given as many channels as it takes.

    Raises:
        UserError: it is not; the line says which edit the model is for.
    """
    if given != wanted:
        raise UserError(f"the U-Net takes {wanted} channels, not {given}: {_NEEDS[kind]}")


def latent_channels(vae: "AutoencoderKL | VQModel") -> int:
    """C of the latents; in a VQ model they are what its codebook is looked up with."""
    return vae.config.get("vq_embed_dim") or vae.config["latent_channels"]


def latent_affine(vae: "AutoencoderKL | VQModel") -> tuple[Tensor, Tensor]:
    """Gain and offset, each [1, C, 1, 1] or [1, 1, 1, 1], of z = gain * latents + offset.

    The config says latents = (z - shift_factor) * scaling_factor, or with statistics for each
    channel (z - latents_mean) / latents_std * scaling_factor.

    Raises:
        UserError: the config's numbers are none, not finite, or a scale is zero.
    """
    mean = _each(vae.config.get("latents_mean") or vae.config.get("shift_factor") or 0.0)
    std = _each(vae.config.get("latents_std") or 1.0)
    scale = vae.config["scaling_factor"]
    channels = latent_channels(vae)
    numbers = [*mean, *std, scale]
    sound = all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
    if not (sound and scale and all(std)) or {len(mean), len(std)} - {1, channels}:
        raise UserError(
            "vae: its scaling_factor, shift_factor, latents_mean and latents_std must be finite "
            f"numbers, scales not zero, and lists {channels} long."
        )
    gain, offset = torch.tensor(std) / scale, torch.tensor(mean, dtype=torch.float32)
    return gain.view(1, -1, 1, 1), offset.view(1, -1, 1, 1)

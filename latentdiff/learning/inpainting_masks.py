"""Training to inpaint: masks drawn on the fly, and a U-Net that sees them and what is around.

Rombach et al. 2022 (LDM), section 4.5; the layout is of Stable Diffusion's inpainting checkpoints.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.data.examples import Example
from latentdiff.data.variants import Size, Variant
from latentdiff.editing.masks import inpainting_channels, masked_picture
from latentdiff.errors import UserError
from latentdiff.learning.batches import to_range
from latentdiff.learning.order import Stream, generator
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.pictures import to_uint8

WHOLE = 0.25  # of all masks, so that the model still draws from words alone


def draw_mask(seed: int, step: int, place: int, size: Size) -> Tensor:
    """1 in the hole, 0 around it: float32 [1, H, W], a function of (seed, step, place).

    The whole picture, or one to three boxes or strokes whose sides and lengths are from an eighth
    to three quarters of the picture's.
    """
    random = generator(seed, Stream.MASK, step, place)
    height, width = size
    if random.random() < WHOLE:
        return torch.ones(1, height, width)
    image = Image.new("L", (width, height))
    pencil = ImageDraw.Draw(image)
    for _ in range(random.integers(1, 4)):
        at = random.random(2) * (width, height)
        to = at + random.uniform(0.125, 0.75, 2) * (width, height) * random.choice((-1, 1), 2)
        if random.random() < 0.5:
            left, right = sorted((at[0], to[0]))
            top, bottom = sorted((at[1], to[1]))
            pencil.rectangle((left, top, right, bottom), fill=255)
        else:
            thick = max(1, int(random.uniform(0.05, 0.25) * min(size)))
            pencil.line((*at, *to), fill=255, width=thick)
    return to_uint8(image.convert("RGB"))[:1].float() / 255


def middle(bundle: Bundle) -> Image.Image:
    """A hole in the middle half of each side, white on black."""
    side = min(bundle.size)
    mask = Image.new("L", (side, side))
    mask.paste(255, (side // 4, side // 4, 3 * side // 4, 3 * side // 4))
    return mask


def with_mask_input(bundle: Bundle) -> Bundle:
    """A text-to-image model with 1 + C more input channels, whose weights are zero; others as is.

    At first the new model draws as the old one does, whatever it is shown.

    Raises:
        UserError: it is an InstructPix2Pix model, or has a transformer.
    """
    if bundle.kind == "inpainting":
        return bundle
    if bundle.network.part != "unet":
        raise UserError(f"{bundle.name} has a transformer, which is not given an input for masks")
    if bundle.kind != "text-to-image":
        raise UserError(f"{bundle.name} is an {bundle.kind} model: it cannot learn to inpaint")
    narrow: Any = bundle.network.module
    old, channels = narrow.conv_in, 2 * bundle.latent_channels + 1
    config = {**narrow.config, "in_channels": channels}
    ours = isinstance(narrow, CrossAttentionUNet)
    unet: Any = CrossAttentionUNet(config) if ours else type(narrow).from_config(config)
    weights = narrow.state_dict()
    wide = weights["conv_in.weight"].new_zeros(old.out_channels, channels, *old.kernel_size)
    wide[:, : old.in_channels] = weights["conv_in.weight"]
    unet.load_state_dict({**weights, "conv_in.weight": wide})
    nn.Module.to(unet, bundle.device, bundle.network.dtype)
    return replace(bundle, network=bundle.network.with_module(unet.eval()))


class Holes:
    """The pictures of a run, decoded and kept, 3 bytes a pixel, for masks to be cut out of them.

    Latents of a masked picture cannot be told from those of the whole one, and no two masks are
    alike; so the masked pictures go through the autoencoder at every step, past the cache.

    Raises:
        UserError: a picture cannot be read.
    """

    def __init__(
        self, examples: Sequence[Example], buckets: Sequence[Size], variants: Sequence[Variant]
    ) -> None:
        self.pictures: list[list[Tensor]] = []
        for example, bucket in zip(examples, buckets, strict=True):
            image = example.open()
            self.pictures.append([to_uint8(variant.fill(image, bucket)) for variant in variants])

    @torch.no_grad()
    def beside(
        self, bundle: Bundle, seed: int, step: int, places: list[int], chosen: list[tuple[int, int]]
    ) -> Tensor:
        """Build the channels that follow x_t: mask and masked picture [B, 1 + C, h, w].

        Args:
            chosen: picture number and variant of each sample.
        """
        pictures = torch.stack([self.pictures[number][variant] for number, variant in chosen])
        size = pictures.shape[-2], pictures.shape[-1]
        masks = torch.stack([draw_mask(seed, step, place, size) for place in places])
        masked = bundle.autoencoder.encode(masked_picture(to_range(pictures), masks))
        return inpainting_channels(masks.to(masked.device), masked)

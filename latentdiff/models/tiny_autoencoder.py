"""The tiny autoencoder TAESD (O. Boer Bohan 2023), with the tensor names of diffusers.

It is distilled from the autoencoder of a model, and its latents are already those that the model's
network sees, scaled.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# What a config may choose, with the defaults of diffusers' AutoencoderTiny. Neither magnitude nor
# shift is of latents as a network sees them: they map these to bytes, for pictures of latents.
_CHOICES: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "latent_channels": 4,
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "force_upcast": False,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
# What it must leave alone: other values are other networks.
_FIXED: dict[str, Any] = {
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}
_WIDTHS = ("encoder_block_out_channels", "decoder_block_out_channels")
_BLOCKS = ("num_encoder_blocks", "num_decoder_blocks")


class TinyAutoencoder(nn.Module):
    """An autoencoder of convolutions alone, without norms or attention.

    Attributes:
        config: every key of diffusers' AutoencoderTiny.

    Args:
        config: one in which `odd` finds nothing.
    """

    diffusers_name = "AutoencoderTiny"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        known = _CHOICES | _FIXED
        self.config = {key: config.get(key, default) for key, default in known.items()}
        self.config["block_out_channels"] = self.config["decoder_block_out_channels"]
        self.encoder = TinyEncoder(
            self.config["in_channels"],
            self.config["latent_channels"],
            self.config["encoder_block_out_channels"][0],
            self.config["num_encoder_blocks"],
        )
        self.decoder = TinyDecoder(
            self.config["latent_channels"],
            self.config["out_channels"],
            self.config["decoder_block_out_channels"][0],
            self.config["num_decoder_blocks"],
        )

    @staticmethod
    def odd(config: Mapping[str, Any]) -> str | None:
        """The key of a config that is of another network, with its value; None if none is."""
        told = _CHOICES | dict(config)
        levels = len(told[_BLOCKS[0]])
        for key in (*_WIDTHS, *_BLOCKS):
            one_width = key in _BLOCKS or len(set(told[key])) == 1
            if levels < 2 or len(told[key]) != levels or not one_width or min(told[key]) < 0:
                return f"{key} {told[key]!s:.60}"
        fixed = _FIXED | {"block_out_channels": told["decoder_block_out_channels"]}
        for key, value in config.items():
            if key not in _CHOICES and not key.startswith("_") and value != fixed.get(key):
                return f"{key} {value!s:.60}"
        return None

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]."""
        return self.encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pictures [B, 3, H, W] about [-1, 1]."""
        return self.decoder(latents)


class TinyBlock(nn.Module):
    """Three convolutions and a shortcut, on maps [B, width, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Pictures [B, 3, H, W] to latents [B, C, h, w]."""

    def __init__(self, inside: int, outside: int, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for level, count in enumerate(blocks):
            if level == 0:
                layers.append(nn.Conv2d(inside, width, 3, padding=1))
            else:
                layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
            layers += [TinyBlock(width) for _ in range(count)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, outside, 3, padding=1))

    @staticmethod
    def inward(pictures: Tensor) -> Tensor:
        """Pictures in [-1, 1] as the layers see them, in [0, 1]."""
        return pictures.add(1).div(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.inward(x))


class TinyDecoder(nn.Module):
    """Latents [B, C, h, w] to pictures [B, 3, H, W]."""

    def __init__(self, inside: int, outside: int, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(inside, width, 3, padding=1), nn.ReLU()]
        for level, count in enumerate(blocks):
            layers += [TinyBlock(width) for _ in range(count)]
            if level < len(blocks) - 1:
                layers += [
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(width, width, 3, 1, 1, bias=False),
                ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, outside, 3, padding=1))

    @staticmethod
    def inward(latents: Tensor) -> Tensor:
        """Latents as the layers see them, softly limited to [-3, 3]."""
        return torch.tanh(latents / 3) * 3

    @staticmethod
    def outward(pictures: Tensor) -> Tensor:
        """What the layers say, about [0, 1], as pictures about [-1, 1]."""
        return pictures.mul(2).sub(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outward(self.layers(self.inward(x)))

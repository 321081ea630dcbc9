"""The KL autoencoder of Stable Diffusion, with the tensor names of diffusers' AutoencoderKL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from latentdiff.models.blocks import Downsample, ResnetBlock2D, SpatialAttention, Upsample

_EPS = 1e-6
# What a config may choose, with diffusers' own defaults.
_CHOICES: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# What it must leave alone: other values are other networks.
_FIXED: dict[str, Any] = {"act_fn": "silu"}


@dataclass(frozen=True, slots=True)
class Posterior:
    """A normal distribution of latents [B, C, h, w]: Kingma & Welling 2014."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)


class KLAutoencoder(nn.Module):
    """An autoencoder of pictures: Rombach et al. 2022, sec. 3.1.

    Attributes:
        config: every key of diffusers' AutoencoderKL.

    Args:
        config: one that `understands` accepts.
    """

    diffusers_name = "AutoencoderKL"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        known = _CHOICES | _FIXED
        self.config = {key: config.get(key, default) for key, default in known.items()}
        channels = self.config["latent_channels"]
        shape = {
            "widths": self.config["block_out_channels"],
            "layers": self.config["layers_per_block"],
            "groups": self.config["norm_num_groups"],
            "attends": self.config["mid_block_add_attention"],
        }
        self.encoder = Encoder(self.config["in_channels"], 2 * channels, **shape)
        self.decoder = Decoder(channels, self.config["out_channels"], **shape)
        self.quant_conv, self.post_quant_conv = None, None
        if self.config["use_quant_conv"]:
            self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        if self.config["use_post_quant_conv"]:
            self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @staticmethod
    def understands(config: Mapping[str, Any]) -> bool:
        """True for a config of an autoencoder that this class is, to the last key."""
        levels = len(config.get("block_out_channels", [64]))
        return (
            all(config.get(key, value) == value for key, value in _FIXED.items())
            and config.get("down_block_types") == ["DownEncoderBlock2D"] * levels
            and config.get("up_block_types") == ["UpDecoderBlock2D"] * levels
            and all(key in _CHOICES or key in _FIXED or key.startswith("_") for key in config)
        )

    def register_to_config(self, **changes: object) -> None:
        """Change entries of the config, as the method of diffusers' models does."""
        self.config |= changes

    def encode(self, pictures: Tensor) -> Posterior:
        """Pictures [B, 3, H, W] -> the distribution of their latents [B, C, h, w]."""
        moments = self.encoder(pictures)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pictures [B, 3, H, W]."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


class Encoder(nn.Module):
    """Pictures [B, 3, H, W] to moments [B, 2C, h, w]."""

    def __init__(
        self,
        inside: int,
        outside: int,
        *,
        widths: Sequence[int],
        layers: int,
        groups: int,
        attends: bool,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inside, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            last = level == len(widths) - 1
            change = {} if last else {"downsamplers": Downsample(width, padding=0)}
            self.down_blocks.append(_Level(before, width, layers, groups, change))
        self.mid_block = _Middle(widths[-1], groups, attends=attends)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], outside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents [B, C, h, w] to pictures [B, 3, H, W]."""

    def __init__(
        self,
        inside: int,
        outside: int,
        *,
        widths: Sequence[int],
        layers: int,
        groups: int,
        attends: bool,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inside, widths[-1], 3, padding=1)
        self.mid_block = _Middle(widths[-1], groups, attends=attends)
        self.up_blocks = nn.ModuleList()
        before = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            change = {} if level == 0 else {"upsamplers": Upsample(width)}
            self.up_blocks.append(_Level(before, width, layers + 1, groups, change))
            before = width
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[0], outside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class _Level(nn.Module):
    """Residual blocks, and what changes the size behind them, by its name in a checkpoint."""

    def __init__(
        self, inside: int, width: int, layers: int, groups: int, change: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(width if layer else inside, width, groups, _EPS)
            for layer in range(layers)
        )
        for name, module in change.items():
            self.add_module(name, nn.ModuleList([module]))
        self.change = list(change)

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for name in self.change:
            x = self.get_submodule(name)[0](x)  # pyright: ignore[reportIndexIssue]
        return x


class _Middle(nn.Module):
    def __init__(self, width: int, groups: int, *, attends: bool) -> None:
        super().__init__()
        # Without attention the list is not even empty in diffusers, but it has no tensors either.
        self.attentions = nn.ModuleList([SpatialAttention(width, groups)] if attends else [])
        self.resnets = nn.ModuleList(ResnetBlock2D(width, width, groups, _EPS) for _ in "12")

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)

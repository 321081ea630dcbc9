"""A small classifier of noised latents, for classifier guidance."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

_FREQUENCIES = 16
_CLEANEST = 12.0  # log-SNR beyond which nothing changes


class LatentClassifier(nn.Module):
    """ln p(label | x_t) of latents at any noise, as Dhariwal & Nichol 2021, sec. 4.1, use one.

    It is told the log-SNR and sees x_t at unit power, x_t / sqrt(alpha^2 + sigma^2): so it is the
    same for every process.

    Args:
        latent_channels: C.
        labels: names of the classes.
        width: channels of the first level; the second has twice as many.
    """

    def __init__(self, latent_channels: int, labels: list[str], width: int) -> None:
        super().__init__()
        self.labels = labels
        self.latent_channels = latent_channels
        self.width = width
        self.time = nn.Linear(2 * _FREQUENCIES, 4 * width)
        self.begin = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width, width, 4 * width) for _ in range(2))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.deeper = nn.ModuleList(_Block(2 * width, 2 * width, 4 * width) for _ in range(2))
        self.norm = nn.GroupNorm(8, 2 * width)
        self.end = nn.Linear(2 * width, len(labels))

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Latents [B, C, h, w] at unit power and their log-SNR [B] -> logits [B, labels]."""
        return self.end(self.features(x, log_snr))

    def features(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """What the logits are linear in [B, 2 width]."""
        time = gelu(self.time(_embed(log_snr).to(x.dtype)))
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, time)
        x = self.down(x)
        for block in self.deeper:
            x = block(x, time)
        return gelu(self.norm(x)).mean((2, 3))


class _Block(nn.Module):
    """A residual block, scaled and shifted by the time."""

    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.modulate = nn.Linear(time, 2 * out)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.modulate(time)[:, :, None, None].chunk(2, 1)
        inner = self.conv1(gelu(self.norm1(x)))
        inner = self.norm2(inner) * (1 + scale) + shift
        return x + self.conv2(gelu(inner))


def _embed(log_snr: Tensor) -> Tensor:
    """Sines and cosines of the log-SNR, [B] -> [B, 2 * _FREQUENCIES], float32."""
    place = log_snr.float().clamp(-_CLEANEST, _CLEANEST) / _CLEANEST
    octaves = torch.arange(_FREQUENCIES, device=log_snr.device) / (_FREQUENCIES - 1)
    angles = place[:, None] * (math.pi / 2) * 32**octaves
    return torch.cat([angles.sin(), angles.cos()], 1)

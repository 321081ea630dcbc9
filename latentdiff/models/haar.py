"""Pixels as latents: a wavelet transform in place of an autoencoder, which loses and learns
nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.models.autoencoder import Autoencoder, DiffusersAutoencoder

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel

    from latentdiff.models.kl_autoencoder import KLAutoencoder
    from latentdiff.models.tiny_autoencoder import TinyAutoencoder

MOST_LEVELS = 4


class HaarTransform(nn.Module):
    """The orthonormal Haar wavelet packet of RGB pictures, and the statistics of its channels.

    Mallat 1989, with Haar's two filters: each level makes of a block of 2 x 2 values
    their sum and three differences, halved, so a picture [3, H, W] becomes [3 * 4^L, H / 2^L,
    W / 2^L]. With no level it is the picture.

    Attributes:
        config: `levels`, L.
        mean, std: of each channel, [C]; what the standardised latents are made by.

    Args:
        config: likewise.

    Raises:
        ValueError: no such number of levels.
    """

    diffusers_name: ClassVar[str] = "HaarTransform"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        levels = config.get("levels")
        if (
            isinstance(levels, bool)
            or not isinstance(levels, int)
            or not 0 <= levels <= MOST_LEVELS
        ):
            raise ValueError(f"levels must be 0 .. {MOST_LEVELS}, not {levels!r:.40}")
        self.config = {"levels": levels}
        self.mean = nn.Parameter(torch.zeros(3 * 4**levels))
        self.std = nn.Parameter(torch.ones(3 * 4**levels))

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] -> coefficients [B, C, h, w]."""
        for _ in range(self.config["levels"]):
            a, b = pictures[..., ::2, ::2], pictures[..., ::2, 1::2]
            c, d = pictures[..., 1::2, ::2], pictures[..., 1::2, 1::2]
            bands = a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d
            pictures = torch.cat(bands, 1) / 2
        return pictures

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Coefficients [B, C, h, w] -> pictures [B, 3, H, W]."""
        for _ in range(self.config["levels"]):
            s, x, y, z = coefficients.chunk(4, 1)
            rows = (
                torch.stack([s + x + y + z, s - x + y - z], -1),
                torch.stack([s + x - y - z, s - x - y + z], -1),
            )
            blocks = torch.stack(rows, -3) / 2  # [B, C / 4, h, 2, w, 2]
            coefficients = blocks.flatten(-2).flatten(-3, -2)
        return coefficients

    def check_values(self) -> None:
        """Pass statistics that latents can be standardised by.

        Raises:
            UserError: a deviation is not above 0.
        """
        if not bool((self.std > 0).all()):
            raise UserError("vae: every value of its std must be above 0.")

    @torch.no_grad()
    def fit(self, parts: Sequence[Tensor]) -> None:
        """Take mean and std of each channel from pictures [N, 3, H, W] in [-1, 1], in parts."""
        total, squares, count = 0.0, 0.0, 0
        for part in parts:
            values = self(part.double()).transpose(0, 1).flatten(1)
            total, squares = total + values.sum(1), squares + values.square().sum(1)
            count += values.shape[1]
        mean = torch.as_tensor(total) / count
        variance = torch.as_tensor(squares) / count - mean.square()
        self.mean.copy_(mean)
        self.std.copy_(variance.clamp(min=1e-8).sqrt())


@dataclass(frozen=True, eq=False)
class PixelAutoencoder:
    """A Haar transform as an `Autoencoder`: for diffusion in pixels, as that of SR3 and Imagen.

    Attributes:
        module: the transform.
    """

    module: HaarTransform

    @property
    def factor(self) -> int:
        return 2 ** self.module.config["levels"]

    @property
    def channels(self) -> int:
        return 3 * self.factor**2

    @property
    def scaling_factor(self) -> float | None:
        return None

    def encode(self, pictures: Tensor) -> Tensor:
        return self._standardised(self._coefficients(pictures))

    def decode(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return self.module.inverse(latents.float() * std + mean)

    @torch.no_grad()
    def moments(self, pictures: Tensor) -> Tensor:
        mean = self._coefficients(pictures)
        return torch.cat([mean, torch.zeros_like(mean)], 1)

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, std = moments.chunk(2, 1)
        return self._standardised(mean + std * noise)

    def _coefficients(self, pictures: Tensor) -> Tensor:
        return self.module(pictures.to(self.module.mean.device).float())

    def _standardised(self, coefficients: Tensor) -> Tensor:
        mean, std = self._statistics(coefficients)
        return (coefficients - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (part.to(like.device).float() for part in (self.module.mean, self.module.std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def autoencoder_of(
    module: "HaarTransform | KLAutoencoder | TinyAutoencoder | AutoencoderKL | VQModel",
) -> Autoencoder:
    """The noun around what a `vae` folder holds.

    Raises:
        UserError: see `DiffusersAutoencoder`.
    """
    if isinstance(module, HaarTransform):
        return PixelAutoencoder(module)
    return DiffusersAutoencoder(module)


def fitted_transform(levels: int, parts: Sequence[Tensor]) -> PixelAutoencoder:
    """A transform with the statistics of pictures [N, 3, H, W] in [-1, 1], frozen.

    Raises:
        UserError: no such number of levels.
    """
    try:
        module = HaarTransform({"levels": levels})
    except ValueError as error:
        raise UserError(f"haar: {error}.") from None
    module.fit(parts)
    return PixelAutoencoder(module.requires_grad_(False))

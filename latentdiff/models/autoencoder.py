"""The autoencoder of a model: pictures to standardised latents and back."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError, warn
from latentdiff.models.kl_autoencoder import Posterior
from latentdiff.models.tiling import Tiling, can_tile, decode_tiled, encode_tiled, is_large
from latentdiff.models.tiny_autoencoder import TinyAutoencoder

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel

    from latentdiff.models.kl_autoencoder import KLAutoencoder

# Pixels decoded at once: the activations of an autoencoder are hundreds of times its pictures.
_DECODED_AT_ONCE = 2**20


class Autoencoder(Protocol):
    """Pictures to latents of about unit variance, which a network denoises, and back.

    Scale, shift and statistics of the latents are applied in here and nowhere else.
    """

    @property
    def module(self) -> nn.Module:
        """The network, for its weights and its device."""
        ...

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        ...

    @property
    def channels(self) -> int:
        """C of the latents."""
        ...

    @property
    def scaling_factor(self) -> float | None:
        """The one number that latents are divided by to be the module's own, as InstructPix2Pix
        sees them; None where there is a shift or statistics for each channel, too, or where the
        module's own are those of another autoencoder, scaled."""
        ...

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, C, H / factor, W / factor], float32.

        The mean of the posterior is taken, so the answer is always the same.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pictures [B, 3, h * factor, w * factor], float32 about [-1, 1].

        Many pictures are decoded a few at a time.
        """
        ...

    def moments(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> mean and std of the posterior [B, 2C, h, w], float32.

        They are the module's own numbers, to be kept; `draw` makes latents of them.
        """
        ...

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents [B, C, h, w] out of the posterior: mean + std * noise, standardised.

        Args:
            moments: [B, 2C, h, w], as `moments` gives them; on any device.
            noise: standard normal [B, C, h, w], on the same one.
        """
        ...


@dataclass(frozen=True, eq=False)
class DiffusersAutoencoder:
    """A KL, VQ or tiny autoencoder: ours, or one of diffusers.

    Attributes:
        module: an autoencoder of RGB pictures.
        tiling: whether pictures are computed in tiles, with the same answer in less memory: "on",
            "off", or "auto", those whose widest layer takes more than a GiB. With gradients, and of
            other blocks than those of Stable Diffusion's autoencoder, all is computed at once.

    Raises:
        UserError: it is not of RGB pictures, its config's scale makes no sense, or tiling is "on"
            and its blocks are others.
    """

    module: "KLAutoencoder | TinyAutoencoder | AutoencoderKL | VQModel"
    tiling: Tiling = "auto"

    def __post_init__(self) -> None:
        if (self.module.config["in_channels"], self.module.config["out_channels"]) != (3, 3):
            raise UserError("vae: it is not for RGB pictures of 3 channels.")
        latent_affine(self.module)
        if self.tiling == "on" and not can_tile(self.module):
            raise UserError("tiling: this autoencoder has blocks that cannot be computed in tiles.")

    @property
    def factor(self) -> int:
        return 2 ** (len(self.module.config["block_out_channels"]) - 1)

    @property
    def channels(self) -> int:
        return latent_channels(self.module)

    @property
    def scaling_factor(self) -> float | None:
        config = self.module.config
        if isinstance(self.module, TinyAutoencoder):
            return None  # another's scale is in its latents
        if any(config.get(key) for key in ("shift_factor", "latents_mean", "latents_std")):
            return None
        return config["scaling_factor"]

    def encode(self, pictures: Tensor) -> Tensor:
        posterior = self._posterior(pictures)
        z = posterior if isinstance(posterior, Tensor) else posterior.mean
        return self._standardised(z.float()).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        parameter = next(self.module.parameters())
        gain, offset = (part.to(latents.device) for part in latent_affine(self.module))
        z = _laid_out((latents * gain + offset).to(parameter.device, parameter.dtype))
        pixels = z.shape[-2] * z.shape[-1] * self.factor**2
        chunks = z.split(max(1, _DECODED_AT_ONCE // pixels))
        module: Any = self.module
        if self._tiles(pixels):
            decoded = [decode_tiled(module, chunk) for chunk in chunks]
        else:
            decoded = [module.decode(chunk) for chunk in chunks]
        return torch.cat([getattr(each, "sample", each).float() for each in decoded]).contiguous()

    @torch.no_grad()
    def moments(self, pictures: Tensor) -> Tensor:
        posterior = self._posterior(pictures)
        if isinstance(posterior, Tensor):
            mean = posterior.float()
            return torch.cat([mean, torch.zeros_like(mean)], 1).contiguous()
        return torch.cat([posterior.mean.float(), posterior.std.float()], 1).contiguous()

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, std = moments.chunk(2, 1)
        return self._standardised(mean + std * noise)

    def _posterior(self, pictures: Tensor) -> Any:
        """The distribution of latents; of a VQ model, which has no spread, the latents."""
        parameter = next(self.module.parameters())
        pictures = _laid_out(pictures.to(parameter.device, parameter.dtype))
        if self._tiles(pictures.shape[-2] * pictures.shape[-1]):
            told = encode_tiled(self.module, pictures)
            if isinstance(self.module, TinyAutoencoder) or hasattr(self.module, "quantize"):
                return told
            mean, logvar = told.chunk(2, dim=1)
            return Posterior(mean, logvar.clamp(-30.0, 20.0))
        encoded: Any = self.module.encode(pictures)
        if hasattr(encoded, "latents"):
            return encoded.latents
        return getattr(encoded, "latent_dist", encoded)  # diffusers puts it into an object

    def _tiles(self, pixels: int) -> bool:
        """Tell whether a picture of so many pixels is computed in tiles, and say so if it is."""
        if self.tiling == "off" or torch.is_grad_enabled() or not can_tile(self.module):
            return False
        if self.tiling == "auto" and not is_large(self.module, pixels):
            return False
        if self.tiling == "auto":
            warn(
                f"a picture of {pixels / 1e6:.1f} million pixels goes through the autoencoder in "
                "tiles, which give what the whole would"
            )
        return True

    def _standardised(self, z: Tensor) -> Tensor:
        """The module's own numbers [B, C, h, w] as latents of about unit variance."""
        gain, offset = (part.to(z.device) for part in latent_affine(self.module))
        return (z - offset) / gain


def _laid_out(x: Tensor) -> Tensor:
    """Channels-last without gradients on a CPU: there maps [B, C, H, W] are convolved so in the
    least time and memory."""
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return x
    return x.contiguous(memory_format=torch.channels_last)


def latent_channels(vae: "KLAutoencoder | TinyAutoencoder | AutoencoderKL | VQModel") -> int:
    """C of the latents; in a VQ model they are what its codebook is looked up with."""
    return vae.config.get("vq_embed_dim") or vae.config["latent_channels"]


def latent_affine(
    vae: "KLAutoencoder | TinyAutoencoder | AutoencoderKL | VQModel",
) -> tuple[Tensor, Tensor]:
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


def _each(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]

"""Fresh autoencoders out of diffusers, as they are trained, and their latents made standard."""

from typing import Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn

from latentdiff.models.kl_autoencoder import KLAutoencoder

VAE = AutoencoderKL | VQModel


def build_vae(
    kind: Literal["kl", "vq"],
    channels: tuple[int, ...],
    layers: int,
    latent_channels: int,
    norm_groups: int,
    size: int,
    codes: int = 1024,
) -> VAE:
    """A fresh autoencoder that reduces pictures by 2 ** (len(channels) - 1) per side."""
    shape = {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "latent_channels": latent_channels,
        "norm_num_groups": norm_groups,
        "sample_size": size,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "scaling_factor": 1.0,
    }
    if kind == "kl":
        return AutoencoderKL(**shape)
    return VQModel(**shape, num_vq_embeddings=codes)


class Autoencoding(nn.Module):
    """One training pass of an autoencoder, as a module so that Accelerate can wrap it."""

    def __init__(self, vae: VAE | KLAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct and regularise.

        KL: z = mean + std * noise (Kingma & Welling 2014, eq. 10) and the KL to N(0, 1) per latent
        value (their appendix B). VQ: the codebook and commitment loss (van den Oord et al. 2017,
        eq. 3).

        Args:
            pictures: [B, 3, H, W] in [-1, 1].
            noise: standard normal [B, C, h, w]; a VQ model does not use it.

        Returns:
            Reconstructions [B, 3, H, W] and the regulariser, a scalar.
        """
        if isinstance(self.vae, VQModel):
            latents = self.vae.encode(pictures).latents  # pyright: ignore[reportAttributeAccessIssue]
            decoded = self.vae.decode(latents)
            return decoded.sample, decoded.commit_loss.mean()  # pyright: ignore
        moments = self.vae.encode(pictures).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        mean, logvar = moments.mean.float(), moments.logvar.float()
        latents = mean + torch.exp(0.5 * logvar) * noise
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        return self.vae.decode(latents).sample, kl  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL | KLAutoencoder, mean: Tensor, std: Tensor) -> None:
    """Make each latent channel have mean 0 and std 1 by folding both into the two 1x1 convolutions.

    The autoencoder's pictures stay the same; its latents become (z - mean) / std. So no
    per-channel statistics are needed by whatever reads the folder.

    Args:
        mean, std: [C], of the raw latents over the training pictures.
    """
    into, out = vae.quant_conv, vae.post_quant_conv
    if into is None or out is None:
        raise ValueError("this autoencoder has no quant_conv to fold the statistics into")
    channels = len(mean)
    assert into.bias is not None
    assert out.bias is not None
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2.0 * std.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]

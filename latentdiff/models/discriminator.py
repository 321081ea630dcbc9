"""Discriminators: of patches of pictures for stage 1, of pairs of latents for a denoising GAN."""

import torch
from torch import Tensor, nn

from latentdiff.models.classifier import LatentClassifier


class PatchDiscriminator(nn.Sequential):
    """A PatchGAN (Isola et al. 2017, sec. 3.2.2): pictures [B, 3, H, W] -> logits [B, 1, h, w].

    Group norm stands where the paper has batch norm, so that a logit depends on its picture alone.
    """

    def __init__(self, channels: int = 32, layers: int = 3) -> None:
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for number in range(1, layers + 1):
            wider = channels * min(2**number, 8)
            stride = 2 if number < layers else 1
            parts += [
                nn.Conv2d(width, wider, 4, stride, 1, bias=False),
                nn.GroupNorm(8, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        super().__init__(*parts, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        """Logits per patch, large for real."""
        return super().forward(input)


class PairDiscriminator(nn.Module):
    """Tells whether x_s of a pair (x_s, x_t) is of the forward process: Xiao et al. 2022.

    The caption enters as an inner product of features (Miyato & Koyama 2018, the projection
    discriminator), so that a picture of something else is told, too.

    Args:
        channels: C of the latents.
        text_width: D of the text states.
        width: channels of the first level; the second has twice as many.
    """

    def __init__(self, channels: int, text_width: int, width: int) -> None:
        super().__init__()
        self.body = LatentClassifier(2 * channels, ["of the process"], width)
        self.words = nn.Linear(text_width, 2 * width, bias=False)

    def forward(self, cleaner: Tensor, noisier: Tensor, log_snr: Tensor, words: Tensor) -> Tensor:
        """Logits [B], large for a pair of the process.

        Args:
            cleaner, noisier: x_s and x_t [B, C, h, w] at unit power.
            log_snr: of x_t [B].
            words: a vector of each caption [B, D].
        """
        found = self.body.features(torch.cat([cleaner, noisier], 1), log_snr)
        told = (found * self.words(words)).mean(1)
        return self.body.end(found)[:, 0] + told

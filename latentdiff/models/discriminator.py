"""The patch discriminator of the autoencoder's adversarial term."""

from torch import Tensor, nn


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

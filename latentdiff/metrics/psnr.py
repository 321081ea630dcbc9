"""Peak signal-to-noise ratio."""

from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB of pictures [B, C, H, W] in [-1, 1], picture by picture: [B].

    10 log10(peak^2 / MSE) with peak 2, the width of the range.
    """
    mse = (a.float() - b.float()).square().flatten(1).mean(1)
    return 10.0 * (4.0 / mse.clamp(min=1e-12)).log10()

"""Nearest real picture of a generated one: does it show what was asked, or is it a copy?"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32
_BLUR = 1.0  # sigma in pixels of the 32 x 32 picture
_CHUNK = 256


def blurred_thumbnails(pictures: Tensor) -> Tensor:
    """Pictures as the distance sees them: 32 x 32 RGB in [0, 1], Gaussian blur with sigma 1 pixel.

    Args:
        pictures: [N, 3, H, W], uint8 or floating in [-1, 1].

    Returns:
        float32 [N, 3 * 32 * 32] on the CPU.
    """
    radius = 3
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * _BLUR**2))
    kernel = (kernel / kernel.sum()).repeat(3, 1)
    thumbnails: list[Tensor] = []
    for part in pictures.split(_CHUNK):
        wide = part.cpu().float()
        unit = wide / 255 if part.dtype == torch.uint8 else (wide + 1) / 2
        small = F.interpolate(unit, (SIDE, SIDE), mode="bilinear", antialias=True)
        padded = F.pad(small, (radius,) * 4, mode="reflect")
        rows = F.conv2d(padded, kernel[:, None, :, None], groups=3)
        thumbnails.append(F.conv2d(rows, kernel[:, None, None, :], groups=3).flatten(1))
    return torch.cat(thumbnails)


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """For each query the nearest reference by root mean square difference.

    Args:
        queries: [Q, D] and references: [R, D], as `blurred_thumbnails` gives them.

    Returns:
        distances [Q] (0 is the same, 1 is black against white), indices [Q] into the references.
    """
    # not by |a|^2 + |b|^2 - 2ab, which rounds the small distances of copies away
    mode = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(queries, references, compute_mode=mode)
    least, indices = distances.min(dim=1)
    return least / math.sqrt(queries.shape[1]), indices

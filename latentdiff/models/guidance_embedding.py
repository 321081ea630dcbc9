"""The guidance scale as an input of networks that were distilled with their guidance in them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from latentdiff.diffusion.condition import Condition
from latentdiff.models.network import Network

DISTILLED_SCALE = 8.5
"""The guidance scale of such a network where none is said: that of diffusers' pipeline."""


def embedded_scale(scales: Sequence[float], width: int) -> Tensor:
    """Sines and cosines of 1000 (scale - 1) [B, width], float32.

    Luo et al. 2023 (LCM), section 4.2, for which a scale of 1 is no guidance, too; the waves are
    those of Kingma et al. 2021 (VDM), whose code the authors took.

    Args:
        scales: guidance scales as everywhere here; 1 is off.
        width: the network's `guidance_width`.
    """
    half = width // 2
    # In float32 and in this order: angles of thousands show every rounding.
    told = torch.tensor([scale - 1 for scale in scales]) * 1000.0
    spacing = torch.log(torch.tensor(10000.0)) / max(1, half - 1)
    waves = told[:, None] * torch.exp(torch.arange(half, dtype=torch.float32) * -spacing)
    return torch.nn.functional.pad(torch.cat([waves.sin(), waves.cos()], 1), (0, width % 2))


def told_scale(condition: Condition, network: Network, scale: float | Sequence[float]) -> Condition:
    """The condition [B, ...] with the scale in it, one for all or of each, where the network takes
    one; else as it is."""
    if network.guidance_width is None:
        return condition
    rows = len(next(iter(condition.given().values())))
    scales = scale if isinstance(scale, Sequence) else [scale] * rows
    embedded = embedded_scale(scales, network.guidance_width)
    return replace(condition, guidance_embedding=embedded)

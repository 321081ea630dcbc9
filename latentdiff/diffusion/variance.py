"""The variance of a DDPM step that a network may learn, and how far a step is from the posterior.

A network of 2C outputs says beside its prediction a v in about [-1, 1]: -1 is the variance of the
posterior q(x_there | x_here, x_0), 1 that of the forward kernel ("learned range").
"""

from typing import Literal

import torch
from torch import Tensor

from latentdiff.diffusion.process import Coefficient

Variance = Literal["fixed-small", "fixed-large", "learned-range"]
"""The variance of a DDPM step: the posterior's, the forward kernel's, or the network's own."""


def learned_log_std(v: Tensor, log_small: Coefficient, log_large: Coefficient) -> Tensor:
    """ln of the standard deviation of a step: Nichol & Dhariwal 2021 (Improved DDPM), eq. 15.

    Args:
        v: [B, C, H, W].
        log_small: ln of the posterior's standard deviation.
        log_large: ln of the forward kernel's. Both between the levels visited, which for respaced
            times is their eq. 19.

    Returns:
        [B, C, H, W].
    """
    share = 0.5 * (v + 1)
    return share * log_large + (1 - share) * log_small


def gaussian_kl(log_std: Coefficient, other: Coefficient, distance: Tensor) -> Tensor:
    """KL(N(distance, std^2) | N(0, other^2)) of each number, in nats.

    Args:
        log_std: ln of the one's standard deviation.
        other: ln of the other's; both floats, or broadcast against distance.
        distance: difference of their means, [B, C, H, W].
    """
    apart = torch.as_tensor(other - log_std, dtype=distance.dtype, device=distance.device)
    scaled = distance * torch.as_tensor(-other, dtype=distance.dtype, device=distance.device).exp()
    return apart + 0.5 * ((-2 * apart).exp() - 1 + scaled.square())


def gaussian_surprise(error: Tensor, log_std: Coefficient) -> Tensor:
    """-ln N(error; 0, std^2) of each number, in nats.

    Args:
        error: [B, C, H, W].
        log_std: ln of the standard deviation; a float, or broadcasts against error.
    """
    log_std = torch.as_tensor(log_std, dtype=error.dtype, device=error.device)
    return 0.5 * (error * (-log_std).exp()).square() + log_std + 0.5 * _LOG_2PI


_LOG_2PI = 1.8378770664093453

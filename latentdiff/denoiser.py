"""A network becomes a denoiser: (x_t, level) -> x_0. Predictions are converted here alone."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from latentdiff.prediction import Prediction, to_x0
from latentdiff.process import NoiseLevel, Process

Denoiser = Callable[[Tensor, NoiseLevel], Tensor]
"""(x_t [B, C, H, W], level) -> E[x_0 | x_t] [B, C, H, W]."""

Condition = Mapping[str, Tensor]
"""What a network is told besides x_t and t: tensors by name, each with the batch first."""


class ConditionedDenoiser(Protocol):
    """A denoiser that is told its condition at each call; guidance makes a `Denoiser` of it."""

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Tensor: ...


def network_denoiser(
    network: Callable[[Tensor, Tensor], Tensor], process: Process, prediction: Prediction
) -> Denoiser:
    """A denoiser out of a network without conditions.

    Args:
        network: (x [B, C, H, W] scaled by `process.input_scale`, t [B]) -> output [B, C, H, W].
        process: the forward process the network was trained on.
        prediction: what its output is.
    """
    conditioned = conditioned_denoiser(lambda x, t, _: network(x, t), process, prediction)
    return bind(conditioned, {})


def conditioned_denoiser(
    network: Callable[[Tensor, Tensor, Condition], Tensor],
    process: Process,
    prediction: Prediction,
) -> ConditionedDenoiser:
    """A denoiser out of a network with conditions.

    Args:
        network: (x [B, C, H, W] scaled by `process.input_scale`, t [B], condition) -> output
            [B, C, H, W] in any floating dtype.
        process: the forward process the network was trained on.
        prediction: what its output is.
    """

    def denoise(x: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        # Float32 or better: half precision cannot tell neighbouring times apart.
        dtype = torch.promote_types(x.dtype, torch.float32)
        t = torch.full((len(x),), level.t, dtype=dtype, device=x.device)
        output = network(x * process.input_scale(level.alpha, level.sigma), t, condition)
        return to_x0(prediction, output.to(x.dtype), x, level.alpha, level.sigma)

    return denoise


def bind(denoise: ConditionedDenoiser, condition: Condition) -> Denoiser:
    """The denoiser with its condition fixed."""
    return lambda x, level: denoise(x, level, condition)

"""A network becomes a denoiser: (x_t, level) -> x_0. Predictions are converted here alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class LearnsVariance(Protocol):
    """A denoiser whose network also tells the variance of a DDPM step."""

    def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor: ...

    def with_variance(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """x_0, and v in about [-1, 1]: -1 for the posterior's variance, 1 for the kernel's."""
        ...


@dataclass(frozen=True)
class LearnedVarianceDenoiser:
    """A denoiser out of a network of 2C outputs: Nichol & Dhariwal 2021, eq. 15 ("learned range").

    Args:
        network: (x [B, C, H, W] scaled by `process.input_scale`, t [B]) -> [B, 2C, H, W], of which
            the second half is v.
        process: the forward process the network was trained on.
        prediction: what the first half is.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    process: Process
    prediction: Prediction

    def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return self.with_variance(x, level)[0]

    def with_variance(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        variances: list[Tensor] = []

        def mean_half(x: Tensor, t: Tensor) -> Tensor:
            mean, variance = self.network(x, t).chunk(2, dim=1)
            variances.append(variance)
            return mean

        x0 = network_denoiser(mean_half, self.process, self.prediction)(x, level)
        return x0, variances[0].to(x.dtype)

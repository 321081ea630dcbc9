"""A network becomes a denoiser: (x_t, level) -> x_0. Predictions are converted here alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from latentdiff.diffusion.prediction import Prediction, to_x0
from latentdiff.diffusion.process import NoiseLevel, Process

Denoiser = Callable[[Tensor, NoiseLevel], Tensor]
"""(x_t [B, C, H, W], level) -> E[x_0 | x_t] [B, C, H, W]."""

Condition = Mapping[str, Tensor]
"""What a network is told besides x_t and t: tensors by name, each with the batch first."""

POSITIVE = "positive"
"""In a condition: bool [B], whether it is what the pictures shall show; see `mark`."""

ASK_TOGETHER = (
    "guides and further prompts need a guidance that asks all its conditions at once: "
    "latentdiff.guidance.together"
)


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
    heard: list[Tensor] | None = None,
) -> ConditionedDenoiser:
    """A denoiser out of a network with conditions.

    Args:
        network: (x [B, C, H, W] scaled by `process.input_scale`, t [B], condition) -> output
            [B, C, H, W] in any floating dtype; or [B, 2C, H, W], of which the second half is v, a
            variance that this denoiser does without.
        process: the forward process the network was trained on.
        prediction: what its output is.
        heard: where the v of the condition `mark`ed as positive is noted, or of all where there
            is no mark, for `LearnedVarianceDenoiser`; None forgets it.
    """

    def denoise(x: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        # Float32 or better: half precision cannot tell neighbouring times apart.
        dtype = torch.promote_types(x.dtype, torch.float32)
        t = torch.full((len(x),), level.t, dtype=dtype, device=x.device)
        output = network(x * process.input_scale(level.alpha, level.sigma), t, condition)
        output, *variance = output.to(x.dtype).split(x.shape[1], dim=1)
        if heard is not None and variance:
            rows = condition.get(POSITIVE)
            heard.append(variance[0] if rows is None else variance[0][rows])
        return to_x0(prediction, output, x, level.alpha, level.sigma)

    return denoise


def bind(denoise: ConditionedDenoiser, condition: Condition) -> Denoiser:
    """The denoiser with its condition fixed."""
    return lambda x, level: denoise(x, level, condition)


def mark(condition: Condition, positive: bool) -> Condition:
    """The condition, with a note which rows of a joined batch are those of the positive one.

    The note lies on the CPU, so that reading it makes no device wait.
    """
    pictures = len(next(iter(condition.values())))
    return {**condition, POSITIVE: torch.full((pictures,), positive)}


@runtime_checkable
class LearnsVariance(Protocol):
    """A denoiser whose network also tells the variance of a DDPM step."""

    def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor: ...

    def with_variance(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """x_0, and v in about [-1, 1]: -1 for the posterior's variance, 1 for the kernel's."""
        ...

    def around(self, denoise: Denoiser) -> Self:
        """The same v beside the x_0 of a denoiser that calls this one."""
        ...


@dataclass(frozen=True)
class LearnedVarianceDenoiser:
    """A denoiser out of a network of 2C outputs: Nichol & Dhariwal 2021, eq. 15 ("learned range").

    Guidance extrapolates x_0; v is the positive condition's own, as GLIDE and DiT take it. For one
    run alone: `heard` is written and read within a call.

    Args:
        denoise: a guided `conditioned_denoiser` that was given `heard`.
        heard: where that notes v.
    """

    denoise: Denoiser
    heard: list[Tensor]

    def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return self.with_variance(x, level)[0]

    def with_variance(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        self.heard.clear()
        x0 = self.denoise(x, level)
        return x0, next(values for values in self.heard if len(values))[: len(x)]

    def around(self, denoise: Denoiser) -> Self:
        return replace(self, denoise=denoise)


def learned_variance_denoiser(
    network: Callable[[Tensor, Tensor], Tensor], process: Process, prediction: Prediction
) -> LearnedVarianceDenoiser:
    """A denoiser that tells v, out of a network without conditions.

    Args:
        network: (x [B, C, H, W] scaled by `process.input_scale`, t [B]) -> [B, 2C, H, W].
        process: the forward process the network was trained on.
        prediction: what the first half is.
    """
    heard: list[Tensor] = []
    base = conditioned_denoiser(lambda x, t, _: network(x, t), process, prediction, heard)
    return LearnedVarianceDenoiser(bind(base, {}), heard)

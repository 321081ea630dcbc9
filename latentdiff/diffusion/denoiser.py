"""A network becomes a denoiser: (x_t, level) -> x_0. Predictions are converted here alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from latentdiff.diffusion.condition import Condition, joined
from latentdiff.diffusion.prediction import Prediction, to_x0
from latentdiff.diffusion.process import NoiseLevel, Process


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """The answer of a denoiser.

    Attributes:
        x0: E[x_0 | x_t] [B, C, H, W].
        variance: v in about [-1, 1] [B, C, H, W], the variance of a DDPM step that a network of 2C
            outputs tells: Nichol & Dhariwal 2021, eq. 15. None of any other network.
    """

    x0: Tensor
    variance: Tensor | None = None

    def with_x0(self, x0: Tensor) -> Self:
        """The same variance beside another x_0 [B, C, H, W]."""
        return replace(self, x0=x0)


Denoiser = Callable[[Tensor, NoiseLevel], Estimate]
"""(x_t [B, C, H, W], level) -> its estimate."""

Role = Literal["positive", "negative", "further", "blind"]
"""The part of a condition in guidance: what the pictures shall show; what they shall not, or the
empty prompt; a further prompt; the negative one without the picture of InstructPix2Pix."""


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One of the conditions that the same B pictures are denoised under.

    Attributes:
        role: its part in guidance.
        condition: the condition of the B pictures.
        perturbation: the number, from 1, of the perturbation that spoils the network's attention
            in this branch; 0 for none. See `latentdiff.models.perturbation`.
    """

    role: Role
    condition: Condition
    perturbation: int = 0


class ConditionedDenoiser(Protocol):
    """A denoiser that is told its conditions at each call; guidance makes a `Denoiser` of it."""

    def __call__(
        self, x: Tensor, level: NoiseLevel, branches: Sequence[Branch]
    ) -> tuple[Estimate, ...]:
        """Denoise x_t [B, C, H, W] under each branch, all in one call of the network."""
        ...


class CallsNetwork(Protocol):
    """A network as a denoiser calls it."""

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int]
    ) -> Tensor:
        """The output for x [B, C, H, W], scaled by `process.input_scale`, at times t [B].

        Args:
            x: scaled x_t.
            t: times.
            condition: the condition of the B rows.
            perturbed: the number of the perturbation of each of K equal parts of the rows, or
                empty where no part has one.

        Returns:
            [B, C, H, W] in any floating dtype; or [B, 2C, H, W], the second half v.
        """
        ...


def conditioned_denoiser(
    network: CallsNetwork, process: Process, prediction: Prediction
) -> ConditionedDenoiser:
    """A denoiser out of a network with conditions, for one run.

    The conditions of the branches are joined when they are first asked together, not at each step.

    Args:
        network: see `CallsNetwork`.
        process: the forward process the network was trained on.
        prediction: the prediction type of its output.
    """
    known: dict[tuple[int, ...], tuple[Sequence[Branch], Condition]] = {}

    def condition_of(branches: Sequence[Branch]) -> Condition:
        key = tuple(map(id, branches))
        if key not in known:
            if len(known) == 16:  # a guidance that makes new branches at each step
                known.clear()
            # with the branches themselves, so that their ids stay theirs
            known[key] = tuple(branches), joined([branch.condition for branch in branches])
        return known[key][1]

    def denoise(x: Tensor, level: NoiseLevel, branches: Sequence[Branch]) -> tuple[Estimate, ...]:
        count, channels = len(branches), x.shape[1]
        x = torch.cat([x] * count) if count > 1 else x
        # Float32 or better: half precision cannot tell neighbouring times apart.
        dtype = torch.promote_types(x.dtype, torch.float32)
        t = torch.full((len(x),), level.t, dtype=dtype, device=x.device)
        numbers = [branch.perturbation for branch in branches]
        scaled = x * process.input_scale(level.alpha, level.sigma)
        output = network(scaled, t, condition_of(branches), numbers if any(numbers) else ())
        output, *variance = output.to(x.dtype).split(channels, dim=1)
        x0 = to_x0(prediction, output, x, level.alpha, level.sigma).chunk(count)
        v = variance[0].chunk(count) if variance else [None] * count
        return tuple(map(Estimate, x0, v))

    return denoise


def network_denoiser(
    network: Callable[[Tensor, Tensor], Tensor], process: Process, prediction: Prediction
) -> Denoiser:
    """A denoiser out of a network without conditions.

    Args:
        network: (x [B, C, H, W] scaled by `process.input_scale`, t [B]) -> output [B, C, H, W], or
            [B, 2C, H, W] with a variance.
        process: the forward process the network was trained on.
        prediction: the prediction type of its output.
    """

    def unconditioned(
        x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int]
    ) -> Tensor:
        return network(x, t)

    return bind(conditioned_denoiser(unconditioned, process, prediction), Condition())


def bind(denoise: ConditionedDenoiser, condition: Condition) -> Denoiser:
    """The denoiser with its condition fixed."""
    branches = (Branch("positive", condition),)
    return lambda x, level: denoise(x, level, branches)[0]

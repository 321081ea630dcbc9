"""Solvers that choose their own steps: an embedded pair of methods, and a controller beside it.

The steps are common to a batch, chosen for the picture that is hardest at the moment: a picture
depends on those drawn with it, within the tolerance.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.diffusion.solver import ddim_move, sde_std
from latentdiff.errors import UserError

# Pure noise is left by one first-order step to this sigma / alpha, where x_0 hardly changes yet.
_FIRST_RATIO = 1000.0
_ATTEMPTS = 60


@dataclass(frozen=True)
class PIController:
    """Step-size controller: Soederlind 2003 (Digital filters in adaptive time-stepping).

    A step is accepted if its error, in units of the tolerance, is at most 1. The next step is
    longer by the factor safety error^-power error_before^memory, clipped to 0.2 .. 5.

    Args:
        rtol: tolerance relative to |x|.
        atol: absolute tolerance.
        power: exponent of the error of this step.
        memory: exponent of the error of the step before.
        safety: a factor below 1.

    Raises:
        UserError: a tolerance is not positive and finite (`rtol` may be 0).
    """

    rtol: float
    atol: float
    power: float
    memory: float = 0.0
    safety: float = 0.9

    def __post_init__(self) -> None:
        if not (0 <= self.rtol < math.inf and 0 < self.atol < math.inf):
            raise UserError(f"tolerances must be positive, not {self.rtol} and {self.atol}.")

    def error(self, difference: Tensor, x: Tensor, x_next: Tensor) -> float:
        """The largest of the pictures' root mean squares, in units of the tolerance."""
        scale = self.atol + self.rtol * torch.maximum(x.abs(), x_next.abs())
        squares = (difference / scale).square().flatten(1).mean(1)
        return float(squares.max().sqrt())

    def factor(self, error: float, before: float) -> float:
        if not error > 0:  # exact, or not a number
            return 5.0 if error == 0 else 0.2
        return min(5.0, max(0.2, self.safety * error**-self.power * before**self.memory))


class EmbeddedPair(Protocol):
    """Two methods out of the same evaluations, whose difference is the error of the worse."""

    @property
    def order(self) -> int: ...

    def place(self, level: NoiseLevel) -> float:
        """Map a level to the integration variable, which rises towards the data."""
        ...

    def level(self, place: float) -> NoiseLevel: ...

    def attempt(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        there: NoiseLevel,
        memo: Any,
        noise: NoiseStreams,
    ) -> tuple[Tensor, Tensor, Any]:
        """x at `there`, its error [B, C, H, W], and what the next attempt may use again."""
        ...


class AdaptiveState(NamedTuple):
    """The step to try next, the error of the last accepted one, and the pair's own memory."""

    length: float | None = None
    error: float = 1.0
    memo: Any = None


@dataclass(frozen=True)
class Adaptive:
    """A pair, a controller, and the process whose levels they choose from.

    It runs between any two levels of a timetable, best one of a single step. The last noisy level,
    before clean data, is that of the process's t_min; the step from there is of first order, as is
    the first step out of pure noise.

    Args:
        pair: the embedded pair that makes a step.
        controller: the controller of the step size.
        process: the process that the levels belong to.
        first: length of the first step in the variable of the pair.
        eta: 1 if the pair draws noise, for the step out of pure noise.
        most_calls: how often a run may ask for an estimate before it is given up. An edit that
            jumps back has each stretch begun anew, in several short steps.
    """

    pair: EmbeddedPair
    controller: PIController
    process: Process
    first: float = 0.05
    eta: float = 0.0
    most_calls: int = 2000

    @property
    def order(self) -> int:
        return self.pair.order

    @property
    def stochastic(self) -> bool:
        """True where the settings have it draw noise."""
        return self.eta > 0

    def init(self) -> AdaptiveState:
        return AdaptiveState()

    def step(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        there: NoiseLevel,
        state: AdaptiveState,
        noise: NoiseStreams,
    ) -> tuple[Tensor, AdaptiveState]:
        """All the steps from here to there; the loop calls `advance` instead, edits in between."""
        while here.log_snr < there.log_snr:
            x, here, state = self.advance(denoise, x, here, there, state, noise)
        return x, state

    def advance(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        goal: NoiseLevel,
        state: AdaptiveState,
        noise: NoiseStreams,
    ) -> tuple[Tensor, NoiseLevel, AdaptiveState]:
        """One accepted step towards the goal: x, the level reached, and the state.

        Raises:
            UserError: no step is short enough for the tolerance.
        """
        end = goal if goal.sigma > 0 else self.process.level(self.process.t_min)
        if here.log_snr >= end.log_snr:
            return ddim_move(x, denoise(x, here).x0, here, goal), goal, state
        if here.alpha == 0:
            there = self.process.level_of_ratio(max(_FIRST_RATIO, end.ratio))
            std = sde_std(here, there, self.eta)
            moved = ddim_move(x, denoise(x, here).x0, here, there, std)
            return (moved + std * noise.like(x) if std else moved), there, state
        place, last = self.pair.place(here), self.pair.place(end)
        length, memo = state.length or self.first, state.memo
        for _ in range(_ATTEMPTS):
            whole = place + length >= last - 1e-9
            there = end if whole else self.pair.level(place + length)
            tried = last - place if whole else length
            x_next, difference, memo_next = self.pair.attempt(denoise, x, here, there, memo, noise)
            error = self.controller.error(difference, x, x_next)
            factor = self.controller.factor(error, state.error)
            if error <= 1:
                # A step cut short by the goal says nothing against the longer one.
                length = max(length, tried * factor) if whole else tried * factor
                return x_next, there, AdaptiveState(length, max(error, 1e-4), memo_next)
            length = tried * min(factor, 0.9)
        raise UserError(
            f"no step from t = {here.t:g} meets the tolerance; is the network's output finite? "
            "Else ask for a larger tolerance."
        )

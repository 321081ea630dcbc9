"""What a solver is, and the moves that solvers are made of."""

import math
from typing import Any, Protocol

from torch import Tensor

from latentdiff.denoiser import Denoiser
from latentdiff.noise import NoiseStreams
from latentdiff.process import NoiseLevel, transition

State = Any
"""Each solver's own: what one step hands to the next. Nothing else ever looks inside."""


class Solver(Protocol):
    """A way to step from a level to a cleaner one. It holds settings, never the state of a run."""

    @property
    def order(self) -> int:
        """Order of convergence; of a stochastic solver, that of its mean and covariance."""
        ...

    def init(self) -> State:
        """The state before the first step, and again after every jump back."""
        ...

    def step(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        there: NoiseLevel,
        state: State,
        noise: NoiseStreams,
    ) -> tuple[Tensor, State]:
        """One step.

        Args:
            denoise: (x_t, level) -> x_0.
            x: [B, C, H, W] at `here`.
            here: a level with noise, perhaps with no signal (alpha = 0).
            there: a strictly cleaner level, perhaps without noise (sigma = 0).
            state: what `init` or the step before returned.
            noise: streams of B pictures.

        Returns:
            x at `there` [B, C, H, W], and the state for the next step.
        """
        ...


def ddim_move(
    x: Tensor, x0: Tensor, here: NoiseLevel, there: NoiseLevel, std: float = 0.0
) -> Tensor:
    """Keep the estimated x_0, and of the noise only what fresh noise of `std` leaves room for.

    Song et al. 2021 (DDIM), eq. 12, for any (alpha, sigma), without division by alpha:
    alpha' x_0 + sqrt(sigma'^2 - std^2) eps, with eps = (x - alpha x_0) / sigma.

    With std = 0 it is also one Euler step of EDM's ODE in sigma / alpha, one Euler step along a
    rectified flow, and DPM-Solver++(1): all first-order moves that are exact for a constant x_0.
    """
    keep = math.sqrt(max(0.0, there.sigma**2 - std**2)) / here.sigma
    return keep * x + (there.alpha - keep * here.alpha) * x0


def posterior_std(here: NoiseLevel, there: NoiseLevel) -> float:
    """Standard deviation of q(x_there | x_here, x_0): Ho et al. 2020 (DDPM), eq. 7."""
    return there.sigma / here.sigma * transition(there, here)[1]

"""The interface of a solver, and the update steps that solvers are built from."""

import math
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, Process, transition

State = Any
"""Each solver's own: what one step hands to the next. Nothing else ever looks inside."""


@runtime_checkable
class Solver(Protocol):
    """A way to step from a level to a cleaner one. It holds settings, never the state of a run."""

    @property
    def order(self) -> int:
        """Order of convergence; of a stochastic solver, that of its mean and covariance."""
        ...

    @property
    def stochastic(self) -> bool:
        """True where a step draws noise."""
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
            denoise: (x_t, level) -> its estimate of x_0.
            x: [B, C, H, W] at `here`.
            here: a level with noise, perhaps with no signal (alpha = 0).
            there: a strictly cleaner level, perhaps without noise (sigma = 0).
            state: what `init` or the step before returned.
            noise: streams of B pictures.

        Returns:
            x at `there` [B, C, H, W], and the state for the next step.
        """
        ...


@runtime_checkable
class ChoosesSteps(Protocol):
    """A solver that chooses its own steps between two levels of a timetable."""

    @property
    def most_calls(self) -> int:
        """Most estimates that a run may ask for before it is given up."""
        ...

    def advance(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        goal: NoiseLevel,
        state: State,
        noise: NoiseStreams,
    ) -> tuple[Tensor, NoiseLevel, State]:
        """One step, as far as the solver sees fit: x, the level reached, and the state."""
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


def sde_std(here: NoiseLevel, there: NoiseLevel, eta: float) -> float:
    """Standard deviation of the noise that the diffusion ODE/SDE family draws in one step.

    Xue et al. 2023 (SA-Solver), proposition 4.2, with a constant tau^2 = eta:
    sigma' sqrt(1 - exp(-2 eta h)), h the step in half log-SNR. 0 for eta 0, and for eta 1 that of
    q(x_there | x_here, x_0). Unlike a share of the latter, two half steps compose to a whole one.
    """
    if eta == 0 or there.sigma == 0:
        return 0.0
    return there.sigma * math.sqrt(-math.expm1(-eta * (there.log_snr - here.log_snr)))


def eps_of(x: Tensor, x0: Tensor, here: NoiseLevel) -> Tensor:
    """The noise in x [B, C, H, W] at `here` if its clean picture is x0."""
    return (x - here.alpha * x0) / here.sigma


def between(process: Process, here: NoiseLevel, there: NoiseLevel, share: float) -> NoiseLevel:
    """The level at this share (0..1) of the way in log-SNR; both ends must have a finite one."""
    log_snr = here.log_snr + share * (there.log_snr - here.log_snr)
    return process.level(process.t_of_log_snr(log_snr))

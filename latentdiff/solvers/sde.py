"""Euler-Maruyama on the reverse SDE, and SA-Solver: Adams methods on the SDEs of `sde_std`."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.diffusion.solver import ddim_move, sde_std
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.solvers.adams import gauss_legendre, lagrange_weights
from latentdiff.solvers.dpmpp import check_eta
from latentdiff.solvers.ending import lowered


def log_rates(process: Process, t: float) -> tuple[float, float]:
    """d ln(alpha) / dt and d ln(sigma) / dt, by automatic differentiation."""
    with torch.enable_grad():
        time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        alpha, sigma = process.alpha_sigma(time)
        rates = [
            torch.autograd.grad(value.log(), time, retain_graph=True, allow_unused=True)[0]
            if value.requires_grad
            else None
            for value in (alpha, sigma)
        ]
    fall, rise = (0.0 if rate is None else rate.item() for rate in rates)
    return fall, rise


def reverse_drift(
    process: Process, x: Tensor, x0: Tensor, here: NoiseLevel
) -> tuple[Tensor, float]:
    """The reverse SDE of Song et al. 2021 (Score-Based Generative Modeling), eq. 6, at a level.

    dx = [f x - g^2 score] dt + g dw with f = d ln(alpha) / dt, score = -(x - alpha x_0) / sigma^2
    and g^2 = 2 sigma^2 (d ln(sigma) / dt - f).

    Returns:
        The bracket [B, C, H, W], and g.
    """
    fall, rise = log_rates(process, here.t)
    drift = fall * x + 2 * (rise - fall) * (x - here.alpha * x0)
    return drift, here.sigma * math.sqrt(2 * (rise - fall))


@dataclass(frozen=True)
class EulerMaruyama:
    """Euler-Maruyama in t on the reverse SDE, Song et al. 2021, eq. 6. One evaluation a step.

    The step to clean data is x_0 itself; a step from pure noise, where the rates are infinite, is
    the posterior's.

    Args:
        process: gives the rates.
    """

    process: Process
    order: int = field(default=1, init=False)
    stochastic: bool = field(default=True, init=False)

    def init(self) -> None:
        return None

    def step(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        there: NoiseLevel,
        state: None,
        noise: NoiseStreams,
    ) -> tuple[Tensor, None]:
        x0 = denoise(x, here).x0
        if there.sigma == 0:
            return x0, None
        if here.alpha == 0:
            std = sde_std(here, there, 1.0)
            return ddim_move(x, x0, here, there, std) + std * noise.like(x), None
        drift, size = reverse_drift(self.process, x, x0, here)
        dt = there.t - here.t
        return x + dt * drift + math.sqrt(-dt) * size * noise.like(x), None


class SAState(NamedTuple):
    """State of the SA-Solver: what the next step needs to correct this one.

    Attributes:
        history: (half log-SNR, x_0) of the last levels, the newest first.
        predicted: the mean x_0 that the predictor moved with, or None.
        tau: the amount of noise that it moved with.
    """

    history: tuple[tuple[float, Tensor], ...]
    predicted: Tensor | None
    tau: float


@dataclass(frozen=True)
class SASolver:
    """SA-Solver: Xue et al. 2023 (SA-Solver), algorithm 1, in x_0. One evaluation a step.

    Its stochastic Adams methods integrate the polynomial through the x_0 of the last levels
    exactly (their eq. 14, 17) along the SDE with a constant tau. As in UniPC, the correction is
    added to the x that the loop hands over. The first step and the step to clean data are of first
    order; the last x is not corrected.

    Args:
        tau: amount of noise: 0 is the ODE, 1 the reverse SDE.
        predictor: number of levels that the predictor interpolates, 1 to 4.
        corrector: number of levels of the corrector, the one just reached included, 1 to 4; or 0
            for none.
        noisy: first and last time of the steps with noise, the others then having a tau of 0
            (their section 6.1; diffusers has 200 to 800). A draw of each step is taken even so,
            as there. None: all steps.
        as_in_code: give the slope of two levels the weight h^2 / 2 (1 + tau^2) instead of that of
            the integral, as the authors' code and diffusers do ("empirically we find it will
            slightly improve"); it differs by a term of third order that their paper has not.
        ending: levels of a run towards whose end the predictor's order is `lowered`.

    Raises:
        UserError: a setting out of range.
    """

    tau: float = 1.0
    predictor: int = 2
    corrector: int = 2
    noisy: tuple[float, float] | None = None
    as_in_code: bool = False
    ending: Timetable = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_eta(self.tau)
        if not 1 <= self.predictor <= 4 or not 0 <= self.corrector <= 4:
            raise UserError(
                f"SA-Solver interpolates 1 to 4 levels, not {self.predictor} and {self.corrector}."
            )

    @property
    def order(self) -> int:
        """Order of convergence on the ODE; with noise, of the covariance, and at most 2."""
        best = max(self.predictor, self.corrector)
        return min(best, 2) if self.tau else best

    @property
    def stochastic(self) -> bool:
        """True where the settings have it draw noise."""
        return self.tau > 0

    def init(self) -> SAState:
        return SAState((), None, 0.0)

    def step(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        there: NoiseLevel,
        state: SAState,
        noise: NoiseStreams,
    ) -> tuple[Tensor, SAState]:
        x0 = denoise(x, here).x0
        now, then = 0.5 * here.log_snr, 0.5 * there.log_snr
        if state.predicted is not None and self.corrector:
            known = ((now, x0), *state.history)[: self.corrector]
            start = state.history[0][0]
            share = -math.expm1(-(1 + state.tau**2) * (now - start))
            mean = self._mean(known, start, now, state.tau)
            x = x + here.alpha * share * (mean - state.predicted)
        noisy = self.noisy is None or self.noisy[0] <= here.t <= self.noisy[1]
        tau = self.tau if noisy else 0.0
        std = sde_std(here, there, tau**2)
        mean, history = x0, ()
        if now > -math.inf:
            history = ((now, x0), *state.history)[: max(self.predictor, self.corrector)]
            if there.sigma > 0:
                known = history[: lowered(self.predictor, self.ending, here)]
                mean = self._mean(known, now, then, tau)
        moved = ddim_move(x, mean, here, there, std)
        # From pure noise the share of x_0 is not that of a finite step: nothing to correct.
        state = SAState(history, mean if history and there.sigma > 0 else None, tau)
        if std or self.noisy is not None:
            moved = moved + std * noise.like(x)
        return moved, state

    def _mean(
        self, known: tuple[tuple[float, Tensor], ...], start: float, end: float, tau: float
    ) -> Tensor:
        """The constant x_0 that moves x as the polynomial through the known ones does."""
        if len(known) == 1:
            return known[0][1]
        places, weights = gauss_legendre(start, end)
        weights = weights * np.exp((1 + tau**2) * (places - end))
        shares = lagrange_weights([place for place, _ in known], places, weights / weights.sum())
        if self.as_in_code and len(known) == 2:
            rate, h = 1 + tau**2, end - start
            exact = (h * rate + math.expm1(-rate * h)) / rate**2
            more = rate * (h**2 / 2 - exact) / -math.expm1(-rate * h)
            shares[1] += more / (known[1][0] - known[0][0])
        total = known[0][1]
        for share, (_, x0) in zip(shares[1:], known[1:], strict=True):
            total = total + share * (x0 - known[0][1])
        return total

"""Adams-Bashforth methods on the noise: DEIS and, as one of its forms, linear multistep (LMS)."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.diffusion.solver import ddim_move, eps_of
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.registry import check_name
from latentdiff.solvers.ending import lowered

Floats = NDArray[np.float64]
Variable = Literal["log-rho", "rho", "t"]
History = tuple[tuple[NoiseLevel, Tensor], ...]
"""Levels and what was seen there, the newest first."""

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def gauss_legendre(start: float, end: float) -> tuple[Floats, Floats]:
    """16 places and weights for an integral; exact for polynomials up to degree 31."""
    half = 0.5 * (end - start)
    return start + half * (_POINTS + 1), half * _WEIGHTS


def lagrange_weights(nodes: list[float], places: Floats, weights: Floats) -> list[float]:
    """The integral of each Lagrange polynomial on these nodes.

    Args:
        nodes: k different places.
        places: points at which the polynomials are evaluated.
        weights: quadrature weights of these points.

    Returns:
        k numbers; their sum is that of the weights.
    """
    result = []
    for node in nodes:
        values = weights.copy()
        for other in nodes:
            if other is not node:
                values *= (places - other) / (node - other)
        result.append(float(values.sum()))
    return result


def lagrange_integrals(
    levels: list[NoiseLevel],
    here: NoiseLevel,
    there: NoiseLevel,
    variable: Variable,
    process: Process | None,
) -> list[float]:
    """Integral over rho = sigma / alpha, from here to there, of each Lagrange polynomial.

    Args:
        levels: the nodes.
        here: start, with some signal.
        there: end, with some noise unless the variable is "rho".
        variable: variable of the polynomials.
        process: tells t between levels, for "t".
    """
    if variable == "rho":
        places, weights = gauss_legendre(here.ratio, there.ratio)
        return lagrange_weights([level.ratio for level in levels], places, weights)
    logs, weights = gauss_legendre(math.log(here.ratio), math.log(there.ratio))
    weights = weights * np.exp(logs)
    if process is None or variable == "log-rho":
        return lagrange_weights([math.log(level.ratio) for level in levels], logs, weights)
    times = np.array([process.t_of_log_snr(-2 * place) for place in logs.tolist()])
    return lagrange_weights([level.t for level in levels], times, weights)


@dataclass(frozen=True)
class DEIS:
    """DEIS-AB: Zhang & Chen 2023 (DEIS), eq. 14-15. One evaluation a step.

    In x / alpha and rho = sigma / alpha the probability flow is dx = eps drho (their eq. 8 after
    the change of variable of section 3.3). The noise of the last `order` levels is interpolated by
    a polynomial and integrated. The first steps have as much history as there is; a level of pure
    noise, infinitely far away, takes no part.

    Args:
        order: number of levels interpolated.
        variable: variable of the polynomial. "t": tAB-DEIS; "rho": rhoAB-DEIS, which is the linear
            multistep method of k-diffusion; "log-rho": that of diffusers, smoothest of all. All
            but "rho" end with a first-order step to clean data.
        process: tells t between levels; needed for "t" alone.
        ending: levels of a run towards whose end the order is `lowered`.

    Raises:
        UserError: order outside 1..4, an unknown variable, or "t" without a process.
    """

    order: int = 3
    variable: Variable = "log-rho"
    process: Process | None = None
    stochastic: bool = field(default=False, init=False)
    ending: Timetable = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_name("variable", self.variable, get_args(Variable))
        if not 1 <= self.order <= 4:
            raise UserError(f"the order of DEIS must lie between 1 and 4, not {self.order}.")
        if self.variable == "t" and self.process is None:
            raise UserError("DEIS in t needs the process.")

    def init(self) -> History:
        return ()

    def step(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        there: NoiseLevel,
        state: History,
        noise: NoiseStreams,
    ) -> tuple[Tensor, History]:
        x0 = denoise(x, here).x0
        moved = ddim_move(x, x0, here, there)
        if here.alpha == 0:
            return moved, state
        eps = eps_of(x, x0, here)
        history = ((here, eps), *state)[: lowered(self.order, self.ending, here)]
        if len(history) > 1 and (there.sigma > 0 or self.variable == "rho"):
            levels = [level for level, _ in history]
            weights = lagrange_integrals(levels, here, there, self.variable, self.process)
            for weight, (_, eps_before) in zip(weights[1:], history[1:], strict=True):
                moved = moved + there.alpha * weight * (eps_before - eps)
        return moved, history

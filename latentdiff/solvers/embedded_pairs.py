"""Embedded pairs of methods for the adaptive solvers, and the solvers that they make."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.diffusion.solver import between, ddim_move, eps_of
from latentdiff.solvers.adaptive import Adaptive, PIController
from latentdiff.solvers.dpm import slope_weight
from latentdiff.solvers.sde import reverse_drift

# Dormand & Prince 1980, table 2: nodes, stages, and b - b^ of the embedded fourth order.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


class _Seen(NamedTuple):
    """The slope at an x; worth nothing for another x (an edit may have come between)."""

    x: Tensor
    slope: Tensor


@dataclass(frozen=True)
class DormandPrince:
    """Dormand & Prince 1980, orders 5 and 4, on the probability flow. Six evaluations a step.

    In y = x / r, r = sqrt(alpha^2 + sigma^2), and the angle w = atan(alpha / sigma), the flow is
    dy/dw = (x_0 - alpha x / r^2) r / sigma: finite from pure noise on.

    Args:
        process: the process of the levels.
    """

    process: Process
    order: int = field(default=5, init=False)

    def place(self, level: NoiseLevel) -> float:
        return math.atan2(level.alpha, level.sigma)

    def level(self, place: float) -> NoiseLevel:
        return self.process.level_of_ratio(1 / math.tan(place))

    def attempt(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        there: NoiseLevel,
        memo: _Seen | None,
        noise: NoiseStreams,
    ) -> tuple[Tensor, Tensor, _Seen]:
        def slope(y: Tensor, level: NoiseLevel) -> Tensor:
            size = math.hypot(level.alpha, level.sigma)
            return (size * denoise(size * y, level).x0 - level.alpha * y) / level.sigma

        start, end = self.place(here), self.place(there)
        length = end - start
        y = x / math.hypot(here.alpha, here.sigma)
        slopes = [memo.slope if memo is not None and memo.x is x else slope(y, here)]
        y_next = y
        for node, row in zip(_NODES[1:], _STAGES[1:], strict=True):
            y_next = y
            for weight, value in zip(row, slopes, strict=True):
                y_next = y_next + length * weight * value
            level = there if node == 1 else self.level(start + node * length)
            slopes.append(slope(y_next, level))
        difference = 0.0 * y
        for weight, value in zip(_ERROR, slopes, strict=True):
            difference = difference + length * weight * value
        size = math.hypot(there.alpha, there.sigma)
        x_next = size * y_next
        return x_next, size * difference, _Seen(x_next, slopes[-1])


@dataclass(frozen=True)
class DPMSolver23:
    """DPM-Solver-3 with DPM-Solver-2 inside: Lu et al. 2022, appendix C. Three evaluations.

    Args:
        process: the process of the levels.
    """

    process: Process
    order: int = field(default=3, init=False)

    def place(self, level: NoiseLevel) -> float:
        return 0.5 * level.log_snr

    def level(self, place: float) -> NoiseLevel:
        return self.process.level(self.process.t_of_log_snr(2 * place))

    def attempt(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        there: NoiseLevel,
        memo: None,
        noise: NoiseStreams,
    ) -> tuple[Tensor, Tensor, None]:
        x0 = denoise(x, here).x0
        eps = eps_of(x, x0, here)
        first, second = (between(self.process, here, there, share) for share in (1 / 3, 2 / 3))
        x_first = ddim_move(x, x0, here, first)
        change = eps_of(x_first, denoise(x_first, first).x0, first) - eps
        x_second = ddim_move(x, x0, here, second) + 2 * slope_weight(here, second) * change
        change_second = eps_of(x_second, denoise(x_second, second).x0, second) - eps
        moved = ddim_move(x, x0, here, there)
        growth = -there.sigma * math.expm1(0.5 * (there.log_snr - here.log_snr))
        low = moved + 1.5 * growth * change
        high = moved + 1.5 * slope_weight(here, there) * change_second
        return high, low - high, None


@dataclass(frozen=True)
class ImprovedEulerMaruyama:
    """Jolicoeur-Martineau et al. 2021 (Gotta Go Fast), algorithm 1. Two evaluations a step.

    An Euler-Maruyama step of the reverse SDE in t, a second one with the drift and the noise's
    size at its end, and their mean, which is kept. A rejected step draws anew, as in the paper.

    Args:
        process: the process of the levels.
    """

    process: Process
    order: int = field(default=1, init=False)

    def place(self, level: NoiseLevel) -> float:
        return -level.t

    def level(self, place: float) -> NoiseLevel:
        return self.process.level(-place)

    def attempt(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        there: NoiseLevel,
        memo: None,
        noise: NoiseStreams,
    ) -> tuple[Tensor, Tensor, None]:
        dt, z = there.t - here.t, noise.like(x)
        drift, size = reverse_drift(self.process, x, denoise(x, here).x0, here)
        euler = x + dt * drift + math.sqrt(-dt) * size * z
        drift, size = reverse_drift(self.process, euler, denoise(euler, there).x0, there)
        other = x + dt * drift + math.sqrt(-dt) * size * z
        improved = 0.5 * (euler + other)
        return improved, euler - improved, None


def rk45(process: Process, rtol: float = 1e-5, atol: float = 1e-5) -> Adaptive:
    """The adaptive probability-flow sampler of Song et al. 2021, appendix D.4."""
    controller = PIController(rtol, atol, power=0.7 / 5, memory=0.4 / 5)
    return Adaptive(DormandPrince(process), controller, process)


def dpm_adaptive(process: Process, rtol: float = 0.05, atol: float = 0.0078) -> Adaptive:
    """DPM-Solver-23 of Lu et al. 2022, appendix C, and its tolerance."""
    controller = PIController(rtol, atol, power=0.7 / 3, memory=0.4 / 3)
    return Adaptive(DPMSolver23(process), controller, process)


def sde_adaptive(process: Process, rtol: float = 0.02, atol: float = 0.0078) -> Adaptive:
    """The adaptive SDE solver of Jolicoeur-Martineau et al. 2021, and its tolerance."""
    reach = process.t_max - process.t_min
    controller = PIController(rtol, atol, power=0.9)
    return Adaptive(ImprovedEulerMaruyama(process), controller, process, 0.01 * reach, eta=1.0)

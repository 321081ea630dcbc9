"""DPM-Solver: exponential Runge-Kutta methods on the noise, in log-SNR. One step, no history."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.diffusion.solver import between, ddim_move, eps_of, posterior_std
from latentdiff.errors import UserError


@dataclass(frozen=True)
class DPM2:
    """DPM-Solver-2: Lu et al. 2022 (DPM-Solver), algorithm 1 with r = 1/2. Two evaluations a step.

    It is the "DPM2" of k-diffusion, and with eta its "DPM2 a": the midpoint rule on the noise,
    the middle being that of log-SNR. The step to clean data, and a step from pure noise, are of
    first order.

    Args:
        process: the process of the level in the middle.
        eta: share of the posterior's standard deviation that is drawn anew at each step.

    Raises:
        UserError: eta outside 0..1.
    """

    process: Process
    eta: float = 0.0
    order: int = field(default=2, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta must lie between 0 and 1, not {self.eta}.")

    @property
    def stochastic(self) -> bool:
        """True where the settings have it draw noise."""
        return self.eta > 0

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
        std = self.eta * posterior_std(here, there)
        x0 = denoise(x, here).x0
        moved = ddim_move(x, x0, here, there, std)
        if there.sigma > 0 and not here.is_noise:
            ratio = math.sqrt(there.sigma**2 - std**2) / there.alpha
            middle = self.process.level_of_ratio(math.sqrt(here.ratio * ratio))
            x_middle = ddim_move(x, x0, here, middle)
            change = eps_of(x_middle, denoise(x_middle, middle).x0, middle) - eps_of(x, x0, here)
            moved = moved + there.alpha * (ratio - here.ratio) * change
        return (moved + std * noise.like(x) if std else moved), None


@dataclass(frozen=True)
class DPMSolver3:
    """DPM-Solver-3: Lu et al. 2022 (DPM-Solver), algorithm 2. Three evaluations a step.

    With r1 = 1/3 and r2 = 2/3. The step to clean data, and a step from pure noise, are of first
    order.

    Args:
        process: the process of the two inner levels.
    """

    process: Process
    order: int = field(default=3, init=False)
    stochastic: bool = field(default=False, init=False)

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
        moved = ddim_move(x, x0, here, there)
        if there.sigma == 0 or here.alpha == 0:
            return moved, None
        eps = eps_of(x, x0, here)
        first, second = (between(self.process, here, there, share) for share in (1 / 3, 2 / 3))
        x_first = ddim_move(x, x0, here, first)
        change = eps_of(x_first, denoise(x_first, first).x0, first) - eps
        x_second = ddim_move(x, x0, here, second) + 2 * slope_weight(here, second) * change
        change = eps_of(x_second, denoise(x_second, second).x0, second) - eps
        return moved + 1.5 * slope_weight(here, there) * change, None


def slope_weight(here: NoiseLevel, there: NoiseLevel) -> float:
    """-sigma' ((e^h - 1) / h - 1), h the step in half log-SNR: what a slope of eps by h adds."""
    h = 0.5 * (there.log_snr - here.log_snr)
    return -there.sigma * (math.expm1(h) / h - 1)

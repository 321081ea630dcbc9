"""DPM-Solver++: exponential integrators on x_0 in log-SNR, along the ODE or along SDEs.

With eta > 0 each of them integrates an SDE with the same marginals, whose noise is `sde_std`;
eta = 1 is the reverse SDE itself ("SDE-DPM-Solver++"). At order 1 they are DDIM with eta 0 or 1.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.diffusion.solver import between, ddim_move, sde_std
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.registry import check_name
from latentdiff.solvers.ending import lowered

Slope = Literal["midpoint", "heun"]

History = tuple[tuple[Tensor, float], ...]
"""x_0 at the last levels and the length of the step from there in half log-SNR, newest first."""


def check_eta(eta: float) -> None:
    """Raises UserError for an eta that is negative or not finite."""
    if not 0 <= eta < math.inf:
        raise UserError(f"eta must be a finite number >= 0, not {eta}.")


@dataclass(frozen=True)
class DPMpp2S:
    """DPM-Solver++(2S): Lu et al. 2022 (DPM-Solver++), algorithm 1, r = 1/2. Two evaluations.

    With eta = 1 it is the "DPM++ SDE" of k-diffusion. The noise of a step contains that of its
    first half, as on one path of the SDE. The step to clean data, and a step from pure noise, are
    of first order.

    Args:
        process: the process of the level in the middle.
        eta: amount of noise; see the module.
        inner: levels to take for the middles instead, as diffusers' DPMSolverSinglestep takes
            every other level of its timetable: a step over one of them has its middle there (the
            paper's r is then not 1/2), any other step is of first order. Without noise only.

    Raises:
        UserError: eta is negative or not finite, or inner levels are given with noise.
    """

    process: Process
    eta: float = 0.0
    inner: Timetable = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_eta(self.eta)
        if self.inner and self.eta:
            raise UserError("DPM-Solver++(2S) with noise has its middles in the middle.")

    @property
    def order(self) -> int:
        return 2

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
        std = sde_std(here, there, self.eta)
        x0 = denoise(x, here).x0
        if there.sigma == 0 or here.alpha == 0:
            moved = ddim_move(x, x0, here, there, std)
            return (moved + std * noise.like(x) if std else moved), None
        if self.inner:
            return self._over_inner(denoise, x, x0, here, there), None
        middle = between(self.process, here, there, 0.5)
        std_middle = sde_std(here, middle, self.eta)
        x_middle = ddim_move(x, x0, here, middle, std_middle)
        if not std:
            return ddim_move(x, denoise(x_middle, middle).x0, here, there), None
        drawn = std_middle * noise.like(x)
        moved = ddim_move(x, denoise(x_middle + drawn, middle).x0, here, there, std)
        std_rest = sde_std(middle, there, self.eta)
        keep = math.sqrt(there.sigma**2 - std_rest**2) / middle.sigma
        return moved + keep * drawn + std_rest * noise.like(x), None

    def _over_inner(
        self, denoise: Denoiser, x: Tensor, x0: Tensor, here: NoiseLevel, there: NoiseLevel
    ) -> Tensor:
        """Algorithm 1 with the r of the inner level that is passed, or first order."""
        passed = [at for at in self.inner if here.log_snr < at.log_snr < there.log_snr]
        if not passed:
            return ddim_move(x, x0, here, there)
        middle = passed[len(passed) // 2]
        share = (middle.log_snr - here.log_snr) / (there.log_snr - here.log_snr)
        x0_middle = denoise(ddim_move(x, x0, here, middle), middle).x0
        return ddim_move(x, x0 + (x0_middle - x0) / (2 * share), here, there)


@dataclass(frozen=True)
class DPMpp2M:
    """DPM-Solver++(2M): Lu et al. 2022 (DPM-Solver++), algorithm 2. One evaluation a step.

    With eta = 1 it is SDE-DPM-Solver++(2M), their eq. 18. Its state is the x_0 of the step before
    and that step's length in half log-SNR. The first step, and the step to clean data, are of
    first order.

    Args:
        eta: amount of noise; see the module.
        slope: weight of the change of x_0 in a step: "midpoint", one half, as in the paper, or
            "heun", the exact integral of a straight line (their code's solver_type).
        ending: levels of a run towards whose end the order is `lowered`.

    Raises:
        UserError: eta is negative or not finite, or an unknown slope.
    """

    eta: float = 0.0
    slope: Slope = "midpoint"
    ending: Timetable = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_eta(self.eta)
        check_name("slope", self.slope, get_args(Slope))

    @property
    def order(self) -> int:
        return 2

    @property
    def stochastic(self) -> bool:
        """True where the settings have it draw noise."""
        return self.eta > 0

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
        h = 0.5 * (there.log_snr - here.log_snr)
        estimate = x0
        if state and there.sigma > 0 and lowered(2, self.ending, here) > 1:
            ((x0_before, h_before),) = state
            # A step from pure noise is infinitely long; its x_0 then has no weight.
            estimate = x0 + self._weight(h) * h / h_before * (x0 - x0_before)
        std = sde_std(here, there, self.eta)
        moved = ddim_move(x, estimate, here, there, std)
        return (moved + std * noise.like(x) if std else moved), ((x0, h),)

    def _weight(self, h: float) -> float:
        """Share of the change over this step, of length h, that counts in its mean x_0."""
        if self.slope == "midpoint":
            return 0.5
        length = (1 + self.eta) * h
        return 1 / -math.expm1(-length) - 1 / length


@dataclass(frozen=True)
class DPMpp3M:
    """DPM-Solver++(3M): x_0 as a parabola in log-SNR through three levels. One evaluation a step.

    The exponential Adams method of Lu et al. 2022 (DPM-Solver++), eq. 9, at n = 3. With
    h_e = (1 + eta) h and x_0', x_0'' the parabola's derivatives in half log-SNR at `here`,

        x' = first order + alpha' (phi_2 h x_0' - phi_3 h^2 x_0''),
        phi_2 = (e^-h_e - 1) / h_e + 1,  phi_3 = phi_2 / h_e - 1/2.

    (The authors' code, k-diffusion and diffusers take half of h^2 x_0'', which is of order 2.)
    The first step and the step to clean data are of first order; the second is 2M's.

    Args:
        eta: amount of noise; see the module.
        ending: levels of a run towards whose end the order is `lowered`.

    Raises:
        UserError: eta is negative or not finite.
    """

    eta: float = 0.0
    ending: Timetable = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_eta(self.eta)

    @property
    def order(self) -> int:
        """Order of convergence on the ODE; with noise, the covariance converges at order 2."""
        return 2 if self.eta else 3

    @property
    def stochastic(self) -> bool:
        """True where the settings have it draw noise."""
        return self.eta > 0

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
        h = 0.5 * (there.log_snr - here.log_snr)
        std = sde_std(here, there, self.eta)
        moved = ddim_move(x, x0, here, there, std)
        history = [(value, length) for value, length in state if length < math.inf]
        history = history[: lowered(3, self.ending, here) - 1]
        if history and there.sigma > 0:
            moved = moved + there.alpha * self._correction(x0, h, history)
        return (moved + std * noise.like(x) if std else moved), ((x0, h), *history[:1])

    def _correction(self, x0: Tensor, h: float, history: list[tuple[Tensor, float]]) -> Tensor:
        """Compute the multistep correction from past changes of x_0, without the factor alpha'."""
        length = (1 + self.eta) * h
        x0_before, h_before = history[0]
        slope = (x0 - x0_before) * (h / h_before)
        if len(history) == 1:
            return -0.5 * math.expm1(-length) * slope
        x0_oldest, h_oldest = history[1]
        bend = (slope - (x0_before - x0_oldest) * (h / h_oldest)) * (h / (h_before + h_oldest))
        slope = slope + h_before / h * bend
        phi_2 = math.expm1(-length) / length + 1
        phi_3 = phi_2 / length - 0.5
        return phi_2 * slope - 2 * phi_3 * bend

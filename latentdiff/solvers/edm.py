"""Euler's and Heun's methods on EDM's ODE in sigma / alpha, with or without churn."""

from dataclasses import dataclass, field

from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.solver import ddim_move
from latentdiff.solvers.churn import Churn


@dataclass(frozen=True)
class Euler:
    """Euler's method: Karras et al. 2022 (EDM), algorithm 2 without lines 9-11.

    Args:
        churn: the noise to add before each step, if any.
    """

    churn: Churn | None = None
    order: int = field(default=1, init=False)

    @property
    def stochastic(self) -> bool:
        """True where the settings have it draw noise."""
        return self.churn is not None and self.churn.s_churn > 0

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
        if self.churn is not None:
            x, here = self.churn.raise_level(x, here, noise)
        return ddim_move(x, denoise(x, here).x0, here, there), None


@dataclass(frozen=True)
class Heun:
    """Heun's method: Karras et al. 2022 (EDM), algorithm 2. Two evaluations a step.

    The step to clean data, and a step from noise with hardly any signal, are Euler steps.

    Args:
        churn: the noise to add before each step, if any.
        velocity: of a rectified flow, the trapezoidal rule on its velocity (x - x_0) / sigma over
            t instead, as diffusers' FlowMatchHeun has it.
    """

    churn: Churn | None = None
    velocity: bool = False
    order: int = field(default=2, init=False)

    @property
    def stochastic(self) -> bool:
        """True where the settings have it draw noise."""
        return self.churn is not None and self.churn.s_churn > 0

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
        if self.churn is not None:
            x, here = self.churn.raise_level(x, here, noise)
        x0 = denoise(x, here).x0
        euler = ddim_move(x, x0, here, there)
        if there.sigma == 0 or (here.is_noise and not self.velocity):
            return euler, None
        if self.velocity:
            slopes = (x - x0) / here.sigma + (euler - denoise(euler, there).x0) / there.sigma
            return x + 0.5 * (there.sigma - here.sigma) * slopes, None
        # The trapezoidal rule on (x / alpha - x_0) / s over s = sigma / alpha, rearranged so that
        # only the change of x_0 is corrected.
        weight = 0.5 * there.alpha * (here.ratio / there.ratio - 1)
        return euler + weight * (denoise(euler, there).x0 - x0), None

"""One-step solvers that draw fresh noise: DDIM(eta), DDPM, Euler ancestral.

Euler ancestral (k-diffusion) is DDIM with eta = 1: written in x / alpha, its sigma_up is the
posterior's standard deviation and its Euler step down to sigma_down is eq. 12 of DDIM.
"""

import math
from dataclasses import dataclass, field
from typing import get_args

from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, transition
from latentdiff.diffusion.solver import ddim_move, posterior_std
from latentdiff.diffusion.variance import Variance, learned_log_std
from latentdiff.errors import UserError
from latentdiff.registry import check_name


@dataclass(frozen=True)
class DDIM:
    """Song et al. 2021 (DDIM), eq. 12 and 16.

    Args:
        eta: share of the posterior's standard deviation that is drawn anew at each step; 0 is
            deterministic, 1 is ancestral sampling.

    Raises:
        UserError: eta outside 0..1.
    """

    eta: float = 0.0
    order: int = field(default=1, init=False)

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
        x_next = ddim_move(x, denoise(x, here).x0, here, there, std)
        return (x_next + std * noise.like(x) if std else x_next), None


@dataclass(frozen=True)
class DDPM:
    """Ho et al. 2020 (DDPM), eq. 6-7: the mean of q(x_there | x_here, x_0), plus noise.

    Args:
        variance: variance of the noise: "fixed-small", the posterior's, "fixed-large", that of the
            forward kernel, or "learned-range", between both by the network's second output
            (`learned_log_std`). None: the network's, or the posterior's where it has none.
            The last step, to clean data, draws none.

    Raises:
        UserError: unknown variance; in a step, a denoiser that tells none.
    """

    variance: Variance | None = None
    order: int = field(default=1, init=False)
    stochastic: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.variance is not None:
            check_name("variance", self.variance, get_args(Variance))

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
        small = posterior_std(here, there)
        wants = self.variance in (None, "learned-range") and there.sigma > 0
        estimate = denoise(x, here)
        mean = ddim_move(x, estimate.x0, here, there, small)
        if wants and estimate.variance is not None:
            log_large = math.log(transition(there, here)[1])
            std = learned_log_std(estimate.variance, math.log(small), log_large).exp()
            return mean + std * noise.like(x), None
        if wants and self.variance is not None:
            raise UserError(
                "the variance 'learned-range' needs a network that tells it: a model trained "
                "with objective.learned_variance."
            )
        std = transition(there, here)[1] if self.variance == "fixed-large" else small
        return (mean + std * noise.like(x) if there.sigma else mean), None

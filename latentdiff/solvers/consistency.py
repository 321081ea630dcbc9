"""Few-step solvers for distilled checkpoints, whose x_0 is a sample, not a mean."""

import math
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, Process, transition
from latentdiff.diffusion.solver import ddim_move
from latentdiff.errors import UserError


def renoise(x0: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor:
    """alpha x_0 + sigma z [B, C, H, W]; nothing is drawn for clean data."""
    return level.alpha * x0 + level.sigma * noise.like(x0) if level.sigma else x0


@dataclass(frozen=True)
class Consistency:
    """Multistep consistency sampling: Song et al. 2023 (Consistency Models), algorithm 1.

    The denoiser's x_0 is taken for the consistency function: jump to it, and noise it again.
    """

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
        return renoise(denoise(x, here).x0, there, noise), None


@dataclass(frozen=True)
class LCM:
    """Latent consistency model: Luo et al. 2023 (LCM), algorithm 3, for their distilled networks.

    The consistency function is c_skip x + c_out x_0 (their eq. 9) with c_skip =
    s^2 / ((k t)^2 + s^2), c_out = k t / sqrt((k t)^2 + s^2) and s = 1/2.

    Args:
        scaling: k, 10 for checkpoints of T = 1000 times.
    """

    scaling: float = 10.0
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
        time = here.t * self.scaling
        power = time**2 + 0.25
        x0 = 0.25 / power * x + time / power**0.5 * denoise(x, here).x0
        return renoise(x0, there, noise), None


@dataclass(frozen=True)
class TCD:
    """Trajectory consistency distillation: Zheng et al. 2024 (TCD), algorithm 4.

    Move deterministically to the level at (1 - gamma) of the next time, and noise up to it from
    there by the forward kernel.

    Args:
        process: the process of that level.
        gamma: amount of noise: 0 is DDIM, 1 multistep consistency sampling.
        whole: round the time of that level down to a whole one, as diffusers does (in float32).

    Raises:
        UserError: gamma outside 0..1.
    """

    process: Process
    gamma: float = 0.3
    whole: bool = False
    order: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise UserError(f"gamma must lie between 0 and 1, not {self.gamma}.")

    @property
    def stochastic(self) -> bool:
        """True where the settings have it draw noise."""
        return self.gamma > 0

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
        if there.sigma == 0 or self.gamma == 0:
            return ddim_move(x, x0, here, there), None
        if self.gamma == 1:
            return renoise(x0, there, noise), None
        end = self.process.data_level().t
        time = end + (1 - self.gamma) * (there.t - end)
        if self.whole:
            time = math.floor(np.float32(1 - self.gamma) * np.float32(there.t))
        target = self.process.level(float(time))
        scale, std = transition(target, there)
        return scale * ddim_move(x, x0, here, target) + std * noise.like(x), None

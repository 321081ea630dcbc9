"""Pseudo numerical methods: classical coefficients on the noise, moved by DDIM's own step.

Their coefficients are those of even steps, whatever the steps are. Between two levels the moved
distance is not even in the step, so the methods are of second order, not of the classical fourth.
"""

from dataclasses import dataclass, field

from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.diffusion.solver import ddim_move, eps_of

History = tuple[Tensor, ...]
"""The noise at the last levels, the newest first."""

# Adams-Bashforth, even steps, by number of levels known.
_ADAMS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def transfer(x: Tensor, eps: Tensor, here: NoiseLevel, there: NoiseLevel) -> Tensor:
    """Liu et al. 2022 (PNDM), eq. 11: DDIM's step with this noise; `here` has some signal."""
    ratio = there.alpha / here.alpha
    return ratio * x + (there.sigma - ratio * here.sigma) * eps


def adams(history: History) -> Tensor:
    """Liu et al. 2022, eq. 12, and its lower orders while the history is short."""
    first, *others = zip(_ADAMS[len(history) - 1], history, strict=True)
    total = first[0] * first[1]
    for weight, eps in others:
        total = total + weight * eps
    return total


@dataclass(frozen=True)
class IPNDM:
    """iPNDM: Zhang & Chen 2023 (DEIS), appendix H.2. One evaluation a step.

    PNDM whose first steps are lower-order Adams steps instead of Runge-Kutta steps.
    """

    order: int = field(default=2, init=False)
    stochastic: bool = field(default=False, init=False)

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
        history = (eps_of(x, x0, here), *state)[:4]
        if here.is_noise:
            return ddim_move(x, x0, here, there), history
        return transfer(x, adams(history), here, there), history


@dataclass(frozen=True)
class PLMS:
    """PLMS as in Stable Diffusion: PNDM that begins with one step of Heun's kind.

    Liu et al. 2022 (PNDM), eq. 12, with its start in latent-diffusion's `plms.py`. One evaluation
    a step, two in the first. From pure noise the first step is DDIM's.
    """

    order: int = field(default=2, init=False)
    stochastic: bool = field(default=False, init=False)

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
        if here.is_noise:
            return moved, state
        eps = eps_of(x, x0, here)
        history = (eps, *state)[:4]
        if state:
            return transfer(x, adams(history), here, there), history
        if there.sigma > 0:
            eps_there = eps_of(moved, denoise(moved, there).x0, there)
            moved = transfer(x, 0.5 * (eps + eps_there), here, there)
        return moved, history


@dataclass(frozen=True)
class PNDM:
    """PNDM: Liu et al. 2022 (PNDM), algorithm 2: three Runge-Kutta steps, then Adams steps.

    Four evaluations in each of the first three steps, one in all others. From noise with hardly any
    signal a step is DDIM's: a Runge-Kutta step divides by alpha four times.

    Args:
        process: the process of the half steps, which are even in t.
    """

    process: Process
    order: int = field(default=2, init=False)
    stochastic: bool = field(default=False, init=False)

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
        if here.is_noise:
            return ddim_move(x, x0, here, there), state
        eps = eps_of(x, x0, here)
        history = (eps, *state)[:4]
        if len(history) == 4 or there.sigma == 0:
            return transfer(x, adams(history), here, there), history
        return transfer(x, self._runge_kutta(denoise, x, eps, here, there), here, there), history

    def _runge_kutta(
        self, denoise: Denoiser, x: Tensor, eps: Tensor, here: NoiseLevel, there: NoiseLevel
    ) -> Tensor:
        """Liu et al. 2022, eq. 13: the noise of one pseudo Runge-Kutta step."""

        def noise_at(x: Tensor, level: NoiseLevel) -> Tensor:
            return eps_of(x, denoise(x, level).x0, level)

        middle = self.process.level(0.5 * (here.t + there.t))
        second = noise_at(transfer(x, eps, here, middle), middle)
        third = noise_at(transfer(x, second, here, middle), middle)
        fourth = noise_at(transfer(x, third, here, there), there)
        return (eps + 2 * second + 2 * third + fourth) / 6

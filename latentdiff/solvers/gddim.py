"""gDDIM: exponential Adams methods in t, a predictor and a corrector."""

from dataclasses import dataclass, field

from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.diffusion.solver import ddim_move, eps_of
from latentdiff.errors import UserError
from latentdiff.solvers.adams import History, lagrange_integrals


@dataclass(frozen=True)
class GDDIM:
    """gDDIM's exponential multistep predictor-corrector: Zhang, Tao & Chen 2023, section 4.

    Where noise and data share one scalar alpha and sigma their R_t is sigma, and Psi is
    alpha' / alpha: the predictor is tAB-DEIS of `degree` levels. The network is asked at what it
    predicts, and the corrector integrates the polynomial in t through that level and the
    `degree` - 1 before it instead. Two evaluations a step; the step to clean data, and a step from
    pure noise, are not corrected. The first steps have as much history as there is.

    Args:
        process: tells t between levels.
        degree: q, the number of levels interpolated, 2 to 4.

    Raises:
        UserError: q outside 2..4.
    """

    process: Process
    degree: int = 3
    stochastic: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 2 <= self.degree <= 4:
            raise UserError(f"the degree of gDDIM must lie between 2 and 4, not {self.degree}.")

    @property
    def order(self) -> int:
        return self.degree

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
        history = ((here, eps), *state)[: self.degree]
        if there.sigma == 0:
            return moved, history
        predicted = moved + self._bend(history, here, there, eps)
        eps_there = eps_of(predicted, denoise(predicted, there).x0, there)
        known = ((there, eps_there), *history)[: self.degree]
        return moved + self._bend(known, here, there, eps), history

    def _bend(self, known: History, here: NoiseLevel, there: NoiseLevel, eps: Tensor) -> Tensor:
        """Compute the multistep correction from the polynomial through the past noises."""
        weights = lagrange_integrals([level for level, _ in known], here, there, "t", self.process)
        total = 0.0 * eps
        for weight, (_, seen) in zip(weights, known, strict=True):
            total = total + there.alpha * weight * (seen - eps)
        return total

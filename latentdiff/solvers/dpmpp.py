"""DPM-Solver++: exponential integrators of the probability-flow ODE in log-SNR."""

from dataclasses import dataclass, field

from torch import Tensor

from latentdiff.denoiser import Denoiser
from latentdiff.noise import NoiseStreams
from latentdiff.process import NoiseLevel
from latentdiff.solvers.base import ddim_move

History = tuple[Tensor, float] | None


@dataclass(frozen=True)
class DPMpp2M:
    """DPM-Solver++(2M): Lu et al. 2022 (DPM-Solver++), algorithm 2. One evaluation a step.

    Its state is the x_0 of the step before and that step's length in half log-SNR. The first
    step, and the step to clean data, are of first order.
    """

    order: int = field(default=2, init=False)

    def init(self) -> History:
        return None

    def step(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        there: NoiseLevel,
        state: History,
        noise: NoiseStreams,
    ) -> tuple[Tensor, History]:
        x0 = denoise(x, here)
        h = 0.5 * (there.log_snr - here.log_snr)
        estimate = x0
        if state is not None and there.sigma > 0:
            x0_before, h_before = state
            # A step from pure noise is infinitely long; its x_0 then has no weight.
            estimate = x0 + h / (2 * h_before) * (x0 - x0_before)
        return ddim_move(x, estimate, here, there), (x0, h)

"""UniPC: a predictor and a corrector out of one formula, on x_0 in log-SNR."""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import numpy as np
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.solver import ddim_move
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.registry import check_name
from latentdiff.solvers.ending import lowered

Variant = Literal["bh1", "bh2"]


class UniPCState(NamedTuple):
    """State of UniPC: what the next step needs to correct this one.

    Attributes:
        history: (half log-SNR, x_0) of the last levels, the newest first.
        predicted: what the predictor added to the first-order step, before alpha', or None.
        made: how many steps there were.
    """

    history: tuple[tuple[float, Tensor], ...]
    predicted: Tensor | float | None
    made: int = 0


@dataclass(frozen=True)
class UniPC:
    """UniPC: Zhao et al. 2023 (UniPC), algorithms 1-2, in x_0. One evaluation a step.

    A step first corrects the x that the step before predicted, by the x_0 estimated there (UniC),
    and then predicts the next (UniP). The correction is added to the x that the loop hands over,
    so what an edit has done to it stays. UniP-p has order p, with UniC-p p + 1. The first step and
    the step to clean data are of first order; the last x is not corrected.

    Args:
        degree: p, 1 to 3.
        variant: their B(h): "bh1" is h, "bh2" is e^h - 1.
        uncorrected: steps, counted from 0, that are not corrected; of the first ones large guidance
            scales make bad corrections (their section 4).
        ending: levels of a run towards whose end the order is `lowered`.

    Raises:
        UserError: p outside 1..3, or an unknown variant.
    """

    degree: int = 2
    variant: Variant = "bh2"
    stochastic: bool = field(default=False, init=False)
    uncorrected: tuple[int, ...] = ()
    ending: Timetable = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_name("variant", self.variant, get_args(Variant))
        if not 1 <= self.degree <= 3:
            raise UserError(f"the degree of UniPC must lie between 1 and 3, not {self.degree}.")

    @property
    def order(self) -> int:
        return self.degree + 1

    def init(self) -> UniPCState:
        return UniPCState((), None)

    def step(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        there: NoiseLevel,
        state: UniPCState,
        noise: NoiseStreams,
    ) -> tuple[Tensor, UniPCState]:
        x0 = denoise(x, here).x0
        now, then = 0.5 * here.log_snr, 0.5 * there.log_snr
        if state.predicted is not None and state.made - 1 not in self.uncorrected:
            x = x + here.alpha * (self._correct(x0, now, state.history) - state.predicted)
        made = state.made + 1
        # B1(h) = h knows no bound; B2(h) is at most 1, however long the first step.
        if here.is_noise if self.variant == "bh1" else here.alpha == 0:
            return ddim_move(x, x0, here, there), UniPCState((), None, made)
        history = ((now, x0), *state.history)[: lowered(self.degree, self.ending, here)]
        moved = ddim_move(x, x0, here, there)
        if there.sigma == 0:
            return moved, UniPCState(history, None, made)
        predicted = self._predict(then, history)
        return moved + there.alpha * predicted, UniPCState(history, predicted, made)

    def _predict(self, then: float, history: tuple[tuple[float, Tensor], ...]) -> Tensor | float:
        """UniP: the sum over the older levels; 0 while there are none."""
        (now, x0), *older = history
        h = then - now
        ratios = [(place - now) / h for place, _ in older]
        # Zhao et al. 2023, appendix F: with one unknown, a_1 = 1/2 is of second order already.
        weights = [0.5] if len(older) == 1 else self._solve(h, ratios)
        total = 0.0
        for weight, ratio, (_, value) in zip(weights, ratios, older, strict=True):
            total = total + self._scale(h) * weight / ratio * (value - x0)
        return total

    def _correct(
        self, x0_there: Tensor, then: float, history: tuple[tuple[float, Tensor], ...]
    ) -> Tensor:
        """UniC: the same sum with the level that was reached among the known ones."""
        (now, x0), *older = history
        h = then - now
        ratios = [*((place - now) / h for place, _ in older), 1.0]
        weights = [0.5] if not older else self._solve(h, ratios)
        total = self._scale(h) * weights[-1] * (x0_there - x0)
        for weight, ratio, (_, value) in zip(weights, ratios, older, strict=False):
            total = total + self._scale(h) * weight / ratio * (value - x0)
        return total

    def _scale(self, h: float) -> float:
        """B(h), positive: in x_0 the exponent is -h."""
        return h if self.variant == "bh1" else -math.expm1(-h)

    def _solve(self, h: float, ratios: list[float]) -> list[float]:
        """Zhao et al. 2023, eq. 5: the weights that match the first derivatives of x_0.

        Row k: sum_m a_m r_m^(k-1) = k! g_k / -B(h) with g_1 = (e^-h - 1) / -h - 1 and
        g_(k+1) = g_k / -h - 1 / (k + 1)!.
        """
        g, right = math.expm1(-h) / -h - 1, []
        for k in range(1, len(ratios) + 1):
            right.append(-math.factorial(k) * g / self._scale(h))
            g = g / -h - 1 / math.factorial(k + 1)
        rows = np.vander(np.array(ratios), increasing=True).T
        return np.linalg.solve(rows, np.array(right)).tolist()

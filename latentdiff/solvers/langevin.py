"""Langevin dynamics at a fixed level: as a corrector after each step, or as the whole method."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.solver import Solver, State
from latentdiff.errors import UserError
from latentdiff.solvers.ancestral import DDIM


def score_of(x: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    """The gradient of ln p(x) at a noisy level, by Tweedie: (alpha x_0 - x) / sigma^2."""
    return (level.alpha * x0 - x) / level.sigma**2


@dataclass(frozen=True)
class PredictorCorrector:
    """Song et al. 2021 (Score-Based Generative Modeling), algorithm 1, Langevin corrector.

    After each step of the predictor, `corrections` times at the level reached (their algorithm 4
    and 5): x + eps score + sqrt(2 eps) z with eps = 2 (snr |z| / |score|)^2. Each picture has its
    own eps; theirs is that of the batch. Their factor 1 - beta in eps, close to 1, is left out.

    Args:
        predictor: any solver.
        corrections: Langevin steps a level, one evaluation each.
        snr: their signal-to-noise ratio r.

    Raises:
        UserError: no correction, or an snr that is not positive.
    """

    predictor: Solver
    corrections: int = 1
    snr: float = 0.16
    stochastic: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.corrections < 1 or not 0 < self.snr < math.inf:
            raise UserError("a corrector needs at least 1 correction and an snr above 0.")

    @property
    def order(self) -> int:
        """Order of the predictor; the Langevin steps add a bias of their own, of about snr^2."""
        return self.predictor.order

    def init(self) -> State:
        return self.predictor.init()

    def step(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        there: NoiseLevel,
        state: State,
        noise: NoiseStreams,
    ) -> tuple[Tensor, State]:
        x, state = self.predictor.step(denoise, x, here, there, state, noise)
        if there.sigma == 0:
            return x, state
        for _ in range(self.corrections):
            score = score_of(x, denoise(x, there).x0, there)
            z = noise.like(x)
            size = 2 * (self.snr * _norm(z) / _norm(score)) ** 2
            x = x + size * score + (2 * size).sqrt() * z
        return x, state


def _norm(x: Tensor) -> Tensor:
    """Compute the norm of each picture [B, C, H, W] -> [B, 1, 1, 1], clamped above 0."""
    norm = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
    return norm.clamp(min=torch.finfo(x.dtype).tiny)


def ancestral_corrector() -> PredictorCorrector:
    """Ancestral steps, each corrected by Langevin's."""
    return PredictorCorrector(DDIM(eta=1.0))


@dataclass(frozen=True)
class AnnealedLangevin:
    """Song & Ermon 2019 (Generative Modeling by Estimating Gradients), algorithm 1.

    At each level `repeats` times x + a / 2 score + sqrt(a) z with a = size sigma^2, and then the
    next level with the same x / alpha, as on their variance-exploding process. The last level ends
    with x_0 (Jolicoeur-Martineau et al. 2021); pure noise is left by an ancestral step.

    Args:
        repeats: T, evaluations a level.
        size: their epsilon / sigma_L^2; 0.2 is their 2e-5 at sigma_L = 0.01.

    Raises:
        UserError: no repeat, or a size outside 0..2, where the dynamics is not stable.
    """

    repeats: int = 20
    size: float = 0.2
    order: int = field(default=1, init=False)
    stochastic: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.repeats < 1 or not 0 < self.size < 2:
            raise UserError("annealed Langevin needs at least 1 repeat and a size between 0 and 2.")

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
        if here.alpha == 0:
            return DDIM(eta=1.0).step(denoise, x, here, there, None, noise)
        variance = self.size * here.sigma**2
        for _ in range(self.repeats):
            score = score_of(x, denoise(x, here).x0, here)
            x = x + 0.5 * variance * score + math.sqrt(variance) * noise.like(x)
        return (denoise(x, here).x0 if there.sigma == 0 else there.alpha / here.alpha * x), None


def draw_cleaner(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    scale: Tensor | float,
    std: Tensor | float,
    noise: Iterable[Tensor],
    size: float,
    most: float = math.inf,
) -> Tensor:
    """Draw from p(x_there | x_here), proportional to p(x_there) q(x_here | x_there).

    Gao et al. 2021. With q = N(a x_there, s^2), Langevin steps
    x + b^2 / 2 (score + a (x_here - a x) / s^2) + b z. Theirs are from x_here on, with b^2 a share
    of s^2. Where the noisier level has hardly any signal left, that share would be far too much,
    and x_here far away; so here both are those of data of unit variance: b^2 = size v from
    a x_here / (s^2 + a^2) on, with v = s^2 / (s^2 + a^2).

    Args:
        score: the gradient of ln p(x_there), [B, C, h, w] -> [B, C, h, w].
        x: x_here [B, C, h, w].
        scale, std: a and s, numbers or [B, 1, 1, 1].
        noise: standard normal [B, C, h, w], one for each step.
        size: b^2 / v.
        most: b^2 is no larger.
    """
    whole = std**2 + scale**2
    values = size * std**2 / whole, scale / std**2, scale, scale / whole
    step, pull, a, first = (torch.as_tensor(v, dtype=x.dtype, device=x.device) for v in values)
    step = step.clamp(max=most)
    made = first * x
    for z in noise:
        made = made + 0.5 * step * (score(made) + pull * (x - a * made)) + step.sqrt() * z
    return made


@dataclass(frozen=True)
class RecoveryLangevin:
    """Gao et al. 2021 (Learning Energy-Based Models by Diffusion Recovery Likelihood), algorithm 2.

    At each step `repeats` times Langevin dynamics at the cleaner level, held near the x of the
    noisier one: see `draw_cleaner`. A step is no longer than the least that a draw may vary, which
    is that of one picture, so the dynamics is stable whatever the data. The end of the run is x_0
    of the last level with noise.

    Args:
        repeats: K, evaluations a step.
        size: of a Langevin step, as a share of the variance of what is drawn.

    Raises:
        UserError: no repeat, or a size outside 0..2, where the dynamics is not stable.
    """

    repeats: int = 30
    size: float = 0.2
    order: int = field(default=1, init=False)
    stochastic: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.repeats < 1 or not 0 < self.size < 2:
            raise UserError("Langevin dynamics needs at least 1 repeat and a size between 0 and 2.")

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
        if there.sigma == 0:
            return denoise(x, here).x0, None
        scale = here.alpha / there.alpha
        std = math.sqrt(here.sigma**2 - (scale * there.sigma) ** 2)
        draws = (noise.like(x) for _ in range(self.repeats))
        least = 1 / (1 / there.sigma**2 + (scale / std) ** 2)

        def score(cleaner: Tensor) -> Tensor:
            return score_of(cleaner, denoise(cleaner, there).x0, there)

        return draw_cleaner(score, x, scale, std, draws, self.size, least), None

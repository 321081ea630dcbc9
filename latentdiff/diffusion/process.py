"""The forward process x_t = alpha x_0 + sigma noise: its schedules, log-SNR and its inverse.

A process knows nothing of what a network predicts, of the levels a run visits or of how training
draws its times. Time has one direction everywhere: `t_max` is noise, small `t` is data.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from latentdiff.errors import UserError
from latentdiff.registry import check_name

Coefficient = float | Tensor


@dataclass(frozen=True, slots=True)
class NoiseLevel:
    """One place on the forward process, in float64 Python numbers.

    Attributes:
        t: the time that the network's embedding gets.
        alpha: scale of the data in x_t.
        sigma: standard deviation of the noise in x_t.
    """

    t: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """ln(alpha^2 / sigma^2): -inf for pure noise, +inf for clean data."""
        if self.alpha == 0:
            return -math.inf
        if self.sigma == 0:
            return math.inf
        return 2 * (math.log(self.alpha) - math.log(self.sigma))

    @property
    def ratio(self) -> float:
        """sigma / alpha, the "sigma" of variance-exploding samplers; inf for pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def is_noise(self) -> bool:
        """True for pure noise, and where hardly any signal is left: sigma / alpha above 1,000.

        The cosine schedule begins at 20,000. From there what a second evaluation corrects, divided
        by alpha, is rounding and error alone, so solvers take a step that is exact for one x_0.
        """
        return self.ratio > 1000


def transition(clean: NoiseLevel, noisy: NoiseLevel) -> tuple[float, float]:
    """Scale and standard deviation of the forward kernel q(x_noisy | x_clean).

    Kingma et al. 2021 (Variational Diffusion Models), eq. 21-22 of appendix A:
    x_noisy = scale * x_clean + std * noise.
    """
    # Both alphas are zero only between two places of pure noise: x then stays as it is.
    scale = noisy.alpha / clean.alpha if clean.alpha else 1.0
    return scale, math.sqrt(max(0.0, noisy.sigma**2 - (scale * clean.sigma) ** 2))


class Process(ABC):
    """A noise schedule: x_t = alpha(t) x_0 + sigma(t) noise.

    Attributes:
        t_min: the time nearest to the data at which a network is asked.
        t_max: the noisiest time.
    """

    t_min: float
    t_max: float

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at each t: two float64 tensors of t's shape, on its device."""

    @abstractmethod
    def t_of_log_snr(self, log_snr: float) -> float:
        """The time at which log-SNR has this value: the inverse of `log_snr`."""

    def level(self, t: float) -> NoiseLevel:
        """The place at time t."""
        alpha, sigma = self.alpha_sigma(torch.tensor(t, dtype=torch.float64))
        return NoiseLevel(float(t), alpha.item(), sigma.item())

    def level_of_ratio(self, ratio: float) -> NoiseLevel:
        """The place where sigma / alpha has this value (0 < ratio < inf)."""
        return self.level(self.t_of_log_snr(-2 * math.log(ratio)))

    def log_snr(self, t: float) -> float:
        """ln(alpha^2 / sigma^2) at time t."""
        return self.level(t).log_snr

    def data_level(self) -> NoiseLevel:
        """The end of every run: alpha 1, sigma 0. No network is asked there."""
        return NoiseLevel(0.0, 1.0, 0.0)

    def prior_scale(self, level: NoiseLevel) -> float:
        """Standard deviation of x at a noisy level, for data of unit variance."""
        return math.hypot(level.alpha, level.sigma)

    def input_scale(self, alpha: Coefficient, sigma: Coefficient) -> Coefficient:
        """Scale x_t by this factor before the network sees it, in training and in sampling.

        1 for processes that keep x_t near unit variance. Otherwise a number if alpha and sigma
        are numbers, or a tensor of their shape.
        """
        del alpha, sigma
        return 1.0


class DiscreteVP(Process):
    """Variance-preserving process of Ho et al. 2020 (DDPM), eq. 4: alpha^2 + sigma^2 = 1.

    t runs over 0 .. num_train_timesteps - 1. Between two whole times log-SNR is interpolated
    linearly. Only in the last interval of a schedule that ends in zero signal, where log-SNR is
    infinite, is the angle atan(sigma / alpha) interpolated instead.

    Args:
        betas: [T] noise variances in (0, 1]; only the last may be 1 (zero terminal SNR).

    Raises:
        UserError: fewer than two betas, or one of them outside its range.
    """

    def __init__(self, betas: NDArray[np.float64]) -> None:
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) < 2:
            raise UserError(
                f"betas must be a list of at least 2 numbers, not of shape {betas.shape}."
            )
        if not (np.all(betas > 0) and np.all(betas[:-1] < 1) and betas[-1] <= 1):
            raise UserError("betas must lie between 0 and 1, and only the last may be 1.")
        self.betas = betas
        self.num_train_timesteps = len(betas)
        self.t_min, self.t_max = 0.0, float(len(betas) - 1)
        with np.errstate(divide="ignore"):
            log_alphas_cumprod = np.cumsum(np.log1p(-betas))
        self.alphas_cumprod: NDArray[np.float64] = np.exp(log_alphas_cumprod)
        self._log_snrs = log_alphas_cumprod - np.log(-np.expm1(log_alphas_cumprod))
        self._table = torch.from_numpy(self._log_snrs)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self._table.to(t.device)
        t = t.to(torch.float64).clamp(self.t_min, self.t_max)
        before = t.floor().clamp(max=self.t_max - 1)
        weight = t - before
        low, high = table[before.long()], table[before.long() + 1]
        log_snr = low + weight * (high.clamp(min=torch.finfo(high.dtype).min) - low)
        endless = torch.isinf(high)
        angle = torch.lerp(_angle(low), _angle(high), weight)
        alpha = torch.where(endless, torch.cos(angle), (0.5 * logsigmoid(log_snr)).exp())
        sigma = torch.where(endless, torch.sin(angle), (0.5 * logsigmoid(-log_snr)).exp())
        # cos(pi / 2) is 6e-17 in floating point; the end of such a schedule is exactly zero.
        return torch.where(endless & (weight == 1), 0.0, alpha), sigma

    def t_of_log_snr(self, log_snr: float) -> float:
        """The time at this log-SNR; beyond the ends of the schedule, the nearest end."""
        last = self.num_train_timesteps - 1
        after = int(np.searchsorted(-self._log_snrs, -log_snr))
        if after == 0:
            return 0.0
        if after > last:
            return float(last)
        low, high = float(self._log_snrs[after - 1]), float(self._log_snrs[after])
        if math.isinf(high):
            low, high, here = (math.atan2(1.0, math.exp(v / 2)) for v in (low, high, log_snr))
            return after - 1 + (here - low) / (high - low)
        return after - 1 + (low - log_snr) / (low - high)


def _angle(log_snr: Tensor) -> Tensor:
    """atan(sigma / alpha), in (0, pi / 2]."""
    return torch.atan(torch.exp(-0.5 * log_snr))


class ContinuousVP(Process):
    """Variance-preserving SDE of Song et al. 2021 (Score-Based Generative Modeling), eq. 33.

    With u = t / t_max: ln alpha = -u^2 (beta_max - beta_min) / 4 - u beta_min / 2.

    Args:
        beta_min: rate of the noise at the data end.
        beta_max: rate of the noise at the noise end.
        t_max: time of the noise end in the unit that the network is told.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_max: float = 1.0) -> None:
        self.beta_min, self.beta_max = beta_min, beta_max
        self.t_min, self.t_max = 1e-3 * t_max, t_max

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        u = t.to(torch.float64) / self.t_max
        log_alpha = -0.25 * u**2 * (self.beta_max - self.beta_min) - 0.5 * u * self.beta_min
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def t_of_log_snr(self, log_snr: float) -> float:
        # -2 ln alpha = softplus(-log_snr) is a quadratic in u; this form of its root never cancels.
        rate = self.beta_max - self.beta_min
        twice = 2 * _softplus(-log_snr)
        return self.t_max * twice / (self.beta_min + math.sqrt(self.beta_min**2 + rate * twice))


class SubVP(ContinuousVP):
    """Sub-VP SDE of Song et al. 2021, eq. 29: alpha as in `ContinuousVP`, sigma = 1 - alpha^2.

    Its variance stays below that of the VP process.
    """

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = super().alpha_sigma(t)
        return alpha, sigma**2

    def t_of_log_snr(self, log_snr: float) -> float:
        # (1 - alpha^2) / alpha = 2 sinh(-ln alpha); then the quadratic of `ContinuousVP`.
        twice = 4 * math.asinh(0.5 * math.exp(-0.5 * log_snr))
        rate = self.beta_max - self.beta_min
        return self.t_max * twice / (self.beta_min + math.sqrt(self.beta_min**2 + rate * twice))


class VE(Process):
    """Variance-exploding SDE of Song et al. 2021, eq. 30: alpha = 1, sigma geometric in t of 0..1.

    Args:
        sigma_min: noise at t = 0.
        sigma_max: noise at t = 1.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.t_min, self.t_max = 0.0, 1.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(torch.float64)
        log_range = math.log(self.sigma_max / self.sigma_min)
        return torch.ones_like(t), self.sigma_min * torch.exp(t * log_range)

    def t_of_log_snr(self, log_snr: float) -> float:
        log_range = math.log(self.sigma_max / self.sigma_min)
        return (-0.5 * log_snr - math.log(self.sigma_min)) / log_range

    def prior_scale(self, level: NoiseLevel) -> float:
        return level.sigma

    def input_scale(self, alpha: Coefficient, sigma: Coefficient) -> Coefficient:
        return (alpha**2 + sigma**2) ** -0.5


class EDM(VE):
    """The process of Karras et al. 2022 (EDM): alpha = 1, t = ln(sigma) / 4 (c_noise, table 1).

    Its preconditioning for data of unit variance (sigma_data = 1) is `input_scale` (c_in) with
    the prediction "v", whose conversion is c_skip and -c_out.

    Args:
        sigma_min: noise at t_min.
        sigma_max: noise at t_max.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__(sigma_min, sigma_max)
        self.t_min, self.t_max = 0.25 * math.log(sigma_min), 0.25 * math.log(sigma_max)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(torch.float64)
        return torch.ones_like(t), (4 * t).exp()

    def t_of_log_snr(self, log_snr: float) -> float:
        return -log_snr / 8

    def data_level(self) -> NoiseLevel:
        return NoiseLevel(self.t_min, 1.0, 0.0)


class Flow(Process):
    """Rectified flow, Liu et al. 2023, eq. 1: alpha = 1 - u, sigma = u with u = t / t_max.

    Args:
        t_max: time of the noise end in the unit that the network is told (1000 for networks in
            the manner of Stable Diffusion 3).
    """

    def __init__(self, t_max: float = 1.0) -> None:
        self.t_min, self.t_max = 1e-3 * t_max, float(t_max)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        u = t.to(torch.float64) / self.t_max
        return 1 - u, u

    def t_of_log_snr(self, log_snr: float) -> float:
        return self.t_max * math.exp(-_softplus(0.5 * log_snr))


def _softplus(x: float) -> float:
    """ln(1 + e^x) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def beta_schedule(
    name: str,
    num_train_timesteps: int = 1000,
    beta_start: float | None = None,
    beta_end: float | None = None,
) -> NDArray[np.float64]:
    """The betas of a discrete variance-preserving process.

    Args:
        name: "linear" (Ho et al. 2020, section 4; 1e-4 to 0.02), "scaled-linear" (linear in
            sqrt(beta); Rombach et al. 2022; 0.00085 to 0.012), "cosine" (Nichol & Dhariwal 2021,
            eq. 17; its ends are fixed) or "sigmoid" (Xu et al. 2022, GeoDiff; 1e-4 to 0.02).
        num_train_timesteps: T, how many.
        beta_start: first beta, instead of the schedule's own.
        beta_end: last beta, instead of the schedule's own.

    Returns:
        [T] float64.

    Raises:
        UserError: unknown name.
    """
    check_name("beta schedule", name, _BETA_ENDS)
    start, end = _BETA_ENDS[name]
    start = start if beta_start is None else beta_start
    end = end if beta_end is None else beta_end
    if name == "linear":
        return np.linspace(start, end, num_train_timesteps)
    if name == "scaled-linear":
        return np.linspace(start**0.5, end**0.5, num_train_timesteps) ** 2
    if name == "sigmoid":
        return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, num_train_timesteps)))
    times = np.linspace(0, 1, num_train_timesteps + 1)
    alphas_cumprod = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], end)


_BETA_ENDS = {
    "linear": (1e-4, 0.02),
    "scaled-linear": (0.00085, 0.012),
    "cosine": (0.0, 0.999),
    "sigmoid": (1e-4, 0.02),
}


def zero_terminal_snr(betas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shift and scale sqrt(alphas_cumprod) so that the last time has no signal left.

    Lin et al. 2024 (Common Diffusion Noise Schedules and Sample Steps are Flawed), algorithm 1.

    Args:
        betas: [T].

    Returns:
        [T] betas whose first sqrt(alphas_cumprod) is unchanged and whose last is zero.
    """
    alphas = np.sqrt(np.cumprod(1 - np.asarray(betas, dtype=np.float64)))
    alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    alphas_cumprod = alphas**2
    return 1 - np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def _vp_builders() -> dict[str, Callable[[], Process]]:
    builders: dict[str, Callable[[], Process]] = {}
    for name in _BETA_ENDS:
        builders[f"vp-{name}"] = lambda name=name: DiscreteVP(beta_schedule(name))
        builders[f"vp-{name}-zsnr"] = lambda name=name: DiscreteVP(
            zero_terminal_snr(beta_schedule(name))
        )
    return builders


_BUILDERS: dict[str, Callable[[], Process]] = {
    **_vp_builders(),
    "vp-continuous": ContinuousVP,
    "sub-vp": SubVP,
    "ve": VE,
    "edm": EDM,
    "flow": lambda: Flow(t_max=1000.0),
}


def names() -> list[str]:
    """Every name that `create` knows."""
    return list(_BUILDERS)


def create(name: str) -> Process:
    """A process with its customary settings, by name.

    Raises:
        UserError: unknown name.
    """
    check_name("process", name, _BUILDERS)
    return _BUILDERS[name]()


def agree(one: Process, other: Process) -> bool:
    """True where two processes have the same levels at both ends and in the middle."""
    if (one.t_min, one.t_max) != (other.t_min, other.t_max):
        return False
    times = (one.t_min, (one.t_min + one.t_max) / 2, one.t_max)
    return all(math.isclose(one.log_snr(t), other.log_snr(t), rel_tol=1e-9) for t in times)

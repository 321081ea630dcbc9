"""Timetables: the noise levels that a run visits, as a plain sequence from noise to data.

Slicing a timetable starts a run late; a level that is noisier than the one before it is a jump
back, which the loop of `latentdiff.diffusion.sampling` makes with the forward kernel.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from latentdiff.errors import UserError
from latentdiff.registry import check_name

if TYPE_CHECKING:
    from latentdiff.diffusion.process import NoiseLevel, Process

Timetable = Sequence["NoiseLevel"]

# Pure noise has no finite sigma / alpha to space steps from, and the 20,000 of the cosine schedule
# would take half of the steps. The first level is then that end itself, and the rest are spaced
# from EDM's sigma_max.
_LARGEST_RATIO = 80.0
_ROUNDING = 1.01  # EDM's own first level is 80 but for rounding


def names() -> list[str]:
    """Every name that `create` knows."""
    return list(_SPACINGS)


def create(name: str, process: "Process", steps: int, *, steps_offset: int = 0) -> Timetable:
    """The levels of a run of so many steps.

    On a discrete process "leading", "trailing" and "linspace" (Lin et al. 2024, table 2) visit
    the whole times that diffusers' DDIM visits. On a continuous one they are even in t. "karras"
    (Karras et al. 2022, eq. 5, rho 7) and "exponential" are even in (sigma / alpha)^(1/7) and
    ln(sigma / alpha) from t_max to t_min; where t_max is noisier than sigma / alpha = 80, the first
    step goes from t_max to that. The latter is even in log-SNR, and "lu" (Lu et al. 2022,
    DPM-Solver, section 3.3) is another name for it. "beta" (Lee et al. 2024, Beta Sampling) takes
    times at even quantiles of Beta(0.6, 0.6), dense at both ends. "ays-sd1" and "ays-sdxl" are the
    tables of Sabour et al. 2024 (Align Your Steps), interpolated in ln(sigma / alpha) for other
    numbers of steps than 10. Each ends with a step to clean data.

    Args:
        name: one of `names()`.
        process: the process the run goes back along.
        steps: number of steps, >= 1.
        steps_offset: added to the times of "leading" on a discrete process (1 in Stable
            Diffusion 1 and 2), as far as the schedule reaches.

    Returns:
        steps + 1 levels, the last of them the data level.

    Raises:
        UserError: unknown name, no step, or more steps than a discrete process has times.
    """
    check_name("timetable", name, _SPACINGS)
    if steps < 1:
        raise UserError(f"a run needs at least 1 step, not {steps}.")
    from latentdiff.diffusion.process import DiscreteVP  # not before: names need no torch

    if name in _EVEN_IN_T and isinstance(process, DiscreteVP):
        times = whole_times(name, process.num_train_timesteps, steps, steps_offset)
        levels = [process.level(float(t)) for t in times]
    else:
        levels = _SPACINGS[name](process, steps)
    return (*levels, process.data_level())


def whole_times(name: str, count: int, steps: int, steps_offset: int = 0) -> np.ndarray:
    """The falling times [steps] of "leading", "trailing" or "linspace" out of 0 .. count - 1.

    Raises:
        UserError: more steps than times.
    """
    if steps > count:
        raise UserError(
            f"the timetable '{name}' has at most {count} steps with this model, not {steps}: ask "
            "for fewer, or take 'karras'."
        )
    times = _DISCRETE[name](count, steps)
    if name == "leading":
        times += min(steps_offset, count - 1 - times[0])
    return times


def ramp(name: str, high: float, low: float, steps: int) -> np.ndarray:
    """sigma / alpha falling from high to low in so many levels: [steps].

    "karras" (Karras et al. 2022, eq. 5, rho 7) and "exponential" are even in its 7th root and its
    logarithm; "beta" takes even quantiles of Beta(0.6, 0.6) of sigma / alpha itself, as diffusers
    does (`create` takes them of t, as the paper has it).
    """
    if name == "karras":
        return np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7
    if name == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    return low + (high - low) * _beta_quantiles(1 - np.linspace(0, 1, steps))


def of_times(process: "Process", times: Sequence[float]) -> Timetable:
    """The levels at these falling times, and a step to clean data.

    Raises:
        UserError: no time, or times that do not fall, or lie outside t_min .. t_max.
    """
    _check_falling("times", times)
    if times[0] > process.t_max or times[-1] < min(process.t_min, process.data_level().t):
        raise UserError(
            f"times must lie within {process.t_max:g} .. {process.t_min:g} with this model."
        )
    return (*(process.level(t) for t in times), process.data_level())


def of_sigmas(process: "Process", sigmas: Sequence[float]) -> Timetable:
    """The levels at these falling sigma / alpha (Karras et al. 2022's "sigmas"), and clean data.

    A last 0 is the clean data itself.

    Raises:
        UserError: no sigma, or sigmas that do not fall or are not positive.
    """
    if len(sigmas) > 1 and sigmas[-1] == 0:
        sigmas = sigmas[:-1]
    _check_falling("sigmas", sigmas)
    if sigmas[-1] <= 0:
        raise UserError("sigmas must be positive; only the last may be 0.")
    return (*(process.level_of_ratio(ratio) for ratio in sigmas), process.data_level())


def _check_falling(name: str, values: Sequence[float]) -> None:
    if not values or not all(math.isfinite(value) for value in values):
        raise UserError(f"{name}: give at least one finite number.")
    if any(later >= earlier for earlier, later in pairwise(values)):
        raise UserError(f"{name} must fall from noise to data.")


def shift(process: "Process", timetable: Timetable, factor: float) -> Timetable:
    """The timetable with every sigma / alpha multiplied by a factor.

    Esser et al. 2024 (Stable Diffusion 3), eq. 23: on rectified flow t becomes
    factor t / (1 + (factor - 1) t). Both ends, pure noise and clean data, stay.

    Raises:
        UserError: a factor that is not positive.
    """
    if not 0 < factor < math.inf:
        raise UserError(f"a timetable is shifted by a positive factor, not {factor}.")
    ends = (0.0, math.inf)
    return tuple(
        level if level.ratio in ends else process.level_of_ratio(level.ratio * factor)
        for level in timetable
    )


def restart(
    timetable: Timetable, low: float, high: float, repeats: int, steps: int | None = None
) -> Timetable:
    """The timetable with jumps back: Xu et al. 2023 (Restart Sampling), algorithm 1.

    When the run first comes down to sigma / alpha <= low it jumps, `repeats` times, back up to the
    cleanest level with sigma / alpha >= high and goes the same levels down again.

    Args:
        timetable: from noise to data.
        low: t_min of the paper, as sigma / alpha.
        high: t_max of the paper, as sigma / alpha.
        repeats: K, how often.
        steps: keep only so many of the steps between, evenly chosen; None keeps all.

    Raises:
        UserError: no two levels lie so, or repeats or steps is not positive.
    """
    if repeats < 1 or (steps is not None and steps < 1):
        raise UserError("a restart needs at least 1 repeat and at least 1 step.")
    top = max((k for k, level in enumerate(timetable) if level.ratio >= high), default=None)
    bottom = next((k for k, level in enumerate(timetable) if level.ratio <= low), None)
    if top is None or bottom is None or top >= bottom:
        raise UserError(f"no levels of this timetable lie at sigma / alpha {high} and {low}.")
    count = bottom - top if steps is None else min(steps, bottom - top)
    chosen = np.round(np.linspace(top, bottom, count + 1)).astype(int).tolist()
    again = [timetable[k] for k in chosen] * repeats
    return (*timetable[: bottom + 1], *again, *timetable[bottom + 1 :])


def _discrete_leading(count: int, steps: int) -> np.ndarray:
    return np.arange(steps)[::-1] * (count // steps)


def _discrete_trailing(count: int, steps: int) -> np.ndarray:
    return np.round(np.arange(count, 0, -count / steps))[:steps].astype(np.int64) - 1


def _discrete_linspace(count: int, steps: int) -> np.ndarray:
    # From the noise down, so that a single step starts at the noise end.
    return np.round(np.linspace(count - 1, 0, steps)).astype(np.int64)


def _leading(process: "Process", steps: int) -> "list[NoiseLevel]":
    stride = (process.t_max - process.t_min) / steps
    return [process.level(process.t_min + k * stride) for k in reversed(range(steps))]


def _trailing(process: "Process", steps: int) -> "list[NoiseLevel]":
    stride = (process.t_max - process.data_level().t) / steps
    return [process.level(process.t_max - k * stride) for k in range(steps)]


def _linspace(process: "Process", steps: int) -> "list[NoiseLevel]":
    return [process.level(float(t)) for t in np.linspace(process.t_max, process.t_min, steps)]


def _karras(process: "Process", steps: int) -> "list[NoiseLevel]":
    return _ramp(process, steps, lambda ratio: ratio ** (1 / 7), lambda y: y**7)


def _exponential(process: "Process", steps: int) -> "list[NoiseLevel]":
    return _ramp(process, steps, math.log, math.exp)


def _ramp(
    process: "Process",
    steps: int,
    warp: Callable[[float], float],
    unwarp: Callable[[float], float],
) -> "list[NoiseLevel]":
    """Levels even in warp(sigma / alpha), the ends exactly at t_max and t_min.

    From an end with hardly any signal the first step goes to where they begin to be even.
    """
    noisiest, cleanest = process.level(process.t_max), process.level(process.t_min)
    if noisiest.ratio > _ROUNDING * _LARGEST_RATIO:
        if steps == 1:
            return [noisiest]
        start = process.level_of_ratio(_LARGEST_RATIO)
        return [noisiest, *_between(process, start, cleanest, steps - 1, warp, unwarp)]
    return _between(process, noisiest, cleanest, steps, warp, unwarp)


def _between(
    process: "Process",
    start: "NoiseLevel",
    end: "NoiseLevel",
    count: int,
    warp: Callable[[float], float],
    unwarp: Callable[[float], float],
) -> "list[NoiseLevel]":
    ramp = np.linspace(warp(start.ratio), warp(end.ratio), count)
    middle = [process.level_of_ratio(unwarp(float(y))) for y in ramp[1:-1]]
    return [start, *middle, end][:count]


def _beta(process: "Process", steps: int) -> "list[NoiseLevel]":
    reach = process.t_max - process.t_min
    quantiles = _beta_quantiles(1 - np.arange(1, steps) / steps)
    inner = (process.level(process.t_min + float(share) * reach) for share in quantiles)
    return [process.level(process.t_max), *inner]


def _beta_quantiles(shares: np.ndarray, shape: float = 0.6) -> np.ndarray:
    """Quantiles of Beta(shape, shape) at increasing or decreasing shares in 0..1.

    Its density (x (1 - x))^(shape - 1) is integrated in u = x^shape up to the middle, where it is
    smooth, by the trapezoidal rule on a fine grid; the upper half is the mirror image.
    """
    u = np.linspace(0, 0.5**shape, 20_001)
    x = u ** (1 / shape)
    density = (1 - x) ** (shape - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    lower = np.interp(np.minimum(shares, 1 - shares), 0.5 * area / area[-1], x)
    return np.where(shares <= 0.5, lower, 1 - lower)


def _ays(table: Sequence[float]) -> "Callable[[Process, int], list[NoiseLevel]]":
    def levels(process: "Process", steps: int) -> "list[NoiseLevel]":
        places = np.linspace(0, len(table) - 1, steps + 1)[:steps]
        logs = np.interp(places, np.arange(len(table)), np.log(table))
        noisiest = process.level(process.t_max)
        # The first place is the model's own noise end, be it noisier or cleaner than the table's.
        inner = (process.level_of_ratio(math.exp(y)) for y in logs[1:].tolist())
        return [noisiest, *(level for level in inner if level.ratio < noisiest.ratio)]

    return levels


# Sabour et al. 2024, the sigmas published for Stable Diffusion 1.5 and SDXL.
_AYS_SD1 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
_AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)


_DISCRETE: dict[str, Callable[[int, int], np.ndarray]] = {
    "leading": _discrete_leading,
    "trailing": _discrete_trailing,
    "linspace": _discrete_linspace,
}

_EVEN_IN_T = tuple(_DISCRETE)

_SPACINGS: "dict[str, Callable[[Process, int], list[NoiseLevel]]]" = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "karras": _karras,
    "exponential": _exponential,
    "lu": _exponential,
    "beta": _beta,
    "ays-sd1": _ays(_AYS_SD1),
    "ays-sdxl": _ays(_AYS_SDXL),
}

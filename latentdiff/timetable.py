"""Which noise levels a run visits: a plain sequence of levels, from noise to data.

Slicing a timetable starts a run late; a level that is noisier than the one before it is a jump
back, which the loop of `latentdiff.sampling` makes with the forward kernel.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from latentdiff.errors import UserError
from latentdiff.process import DiscreteVP, NoiseLevel, Process
from latentdiff.registry import check_name

Timetable = Sequence[NoiseLevel]

# Pure noise has no finite sigma / alpha to space steps from. The first level is then the pure
# noise itself and the rest are spaced from EDM's sigma_max.
_LARGEST_RATIO = 80.0


def names() -> list[str]:
    """Every name that `create` knows."""
    return list(_SPACINGS)


def create(name: str, process: Process, steps: int, *, steps_offset: int = 0) -> Timetable:
    """The levels of a run of so many steps.

    On a discrete process "leading", "trailing" and "linspace" (Lin et al. 2024, table 2) visit
    the whole times that diffusers' DDIM visits. On a continuous one they are even in t. "karras"
    (Karras et al. 2022, eq. 5, rho 7) and "exponential" are even in (sigma / alpha)^(1/7) and
    ln(sigma / alpha) from t_max to t_min. Each ends with a step to clean data.

    Args:
        name: one of `names()`.
        process: the process the run goes back along.
        steps: how many steps, >= 1.
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
    if name in _EVEN_IN_T and isinstance(process, DiscreteVP):
        if steps > process.num_train_timesteps:
            raise UserError(
                f"the timetable '{name}' has at most {process.num_train_timesteps} steps with this "
                f"model, not {steps}: ask for fewer, or take 'karras'."
            )
        times = _DISCRETE[name](process.num_train_timesteps, steps)
        if name == "leading":
            times += min(steps_offset, process.num_train_timesteps - 1 - times[0])
        levels = [process.level(float(t)) for t in times]
    else:
        levels = _SPACINGS[name](process, steps)
    return (*levels, process.data_level())


def _discrete_leading(count: int, steps: int) -> np.ndarray:
    return np.arange(steps)[::-1] * (count // steps)


def _discrete_trailing(count: int, steps: int) -> np.ndarray:
    return np.round(np.arange(count, 0, -count / steps))[:steps].astype(np.int64) - 1


def _discrete_linspace(count: int, steps: int) -> np.ndarray:
    # From the noise down, so that a single step starts at the noise end.
    return np.round(np.linspace(count - 1, 0, steps)).astype(np.int64)


def _leading(process: Process, steps: int) -> list[NoiseLevel]:
    stride = (process.t_max - process.t_min) / steps
    return [process.level(process.t_min + k * stride) for k in reversed(range(steps))]


def _trailing(process: Process, steps: int) -> list[NoiseLevel]:
    stride = (process.t_max - process.data_level().t) / steps
    return [process.level(process.t_max - k * stride) for k in range(steps)]


def _linspace(process: Process, steps: int) -> list[NoiseLevel]:
    return [process.level(float(t)) for t in np.linspace(process.t_max, process.t_min, steps)]


def _karras(process: Process, steps: int) -> list[NoiseLevel]:
    return _ramp(process, steps, lambda ratio: ratio ** (1 / 7), lambda y: y**7)


def _exponential(process: Process, steps: int) -> list[NoiseLevel]:
    return _ramp(process, steps, math.log, math.exp)


def _ramp(
    process: Process,
    steps: int,
    warp: Callable[[float], float],
    unwarp: Callable[[float], float],
) -> list[NoiseLevel]:
    """Levels even in warp(sigma / alpha), the ends exactly at t_max and t_min."""
    noisiest, cleanest = process.level(process.t_max), process.level(process.t_min)
    if math.isinf(noisiest.ratio):
        if steps == 1:
            return [noisiest]
        start = process.level_of_ratio(_LARGEST_RATIO)
        return [noisiest, *_between(process, start, cleanest, steps - 1, warp, unwarp)]
    return _between(process, noisiest, cleanest, steps, warp, unwarp)


def _between(
    process: Process,
    start: NoiseLevel,
    end: NoiseLevel,
    count: int,
    warp: Callable[[float], float],
    unwarp: Callable[[float], float],
) -> list[NoiseLevel]:
    ramp = np.linspace(warp(start.ratio), warp(end.ratio), count)
    middle = [process.level_of_ratio(unwarp(float(y))) for y in ramp[1:-1]]
    return [start, *middle, end][:count]


_DISCRETE: dict[str, Callable[[int, int], np.ndarray]] = {
    "leading": _discrete_leading,
    "trailing": _discrete_trailing,
    "linspace": _discrete_linspace,
}

_EVEN_IN_T = tuple(_DISCRETE)

_SPACINGS: dict[str, Callable[[Process, int], list[NoiseLevel]]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "karras": _karras,
    "exponential": _exponential,
}

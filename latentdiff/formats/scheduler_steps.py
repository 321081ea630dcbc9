"""The times that a model's makers meant it to be sampled at, and the settings of its own solver.

A class of diffusers makes its times in one of four ways:

- "ddim": whole times, those of `latentdiff.diffusion.timetable.create`;
- "sigma" (k-diffusion): times that need not be whole, and ramps of sigma / alpha between the first
  and the last of them;
- "multistep": n + 1 times, the last of which is left out, and ramps over the whole schedule, whose
  times are rounded down for the network;
- "flow": levels even in t down to 1 / num_train_timesteps, shifted.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from latentdiff import solvers
from latentdiff.diffusion import timetable as timetables
from latentdiff.diffusion.process import DiscreteVP, Flow, NoiseLevel, Process
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.formats.scheduler_classes import Family, Lowering
from latentdiff.registry import check_name
from latentdiff.solvers import Solver

Times = Literal["leading", "trailing", "linspace"]
Ramp = Literal["karras", "exponential", "beta", "lu"]
Spacing = Literal[Times, Ramp]
Floats = NDArray[np.float64]

# Diffusers' classes in sigma cannot begin at pure noise: they take this alpha^2 for its 0.
_LEAST_SIGNAL = 2.0**-24
# EDM's sigma_max.
_KARRAS_FROM = 80.0
# A level this much cleaner in log-SNR is another; less is rounding.
_SAME = 1e-4


@dataclass(frozen=True, slots=True)
class Steps:
    """The timetable that a model's makers meant it to be sampled with, and how its solver is set.

    Attributes:
        spacing: of the times; or a ramp in sigma / alpha, whose times follow.
        steps_offset: added to the times of "leading".
        to_clean: whether the last step of the model's own solver goes to clean data, or only to
            the first time's noise. Any other solver goes to clean data.
        family: whose reading of `spacing`; see the module.
        teacher_steps: of a model distilled for few steps (LCM, TCD), how many its teacher made:
            its times are evenly chosen among the teacher's.
        trained_steps: how many a network knows that was trained at the levels of one run alone, as
            the generator of a denoising GAN; a run of another number is warned of.
        within: the times whose first and last level a ramp of the family "sigma" runs between.
        sigma_min: the ramp's end instead.
        sigma_max: the ramp's start instead.
        whole: whether the times of a Karras or Lu ramp are rounded to the nearest whole one.
        lambda_min: half log-SNR below which no time lies, in the family "multistep".
        shift: factor of sigma / alpha in rectified flow.
        from_noise: whether a rectified flow begins at pure noise, not at the last time but one, in
            the family "multistep".
        lowering: when the order of the model's own solver is lowered towards the end of a run.
        paired: whether every other level is the middle of a step of the model's own solver; with
            `lowering`, the last two of an even number are single steps.
        settings: of the model's own solver, beside its name: pairs of argument and value.
        source: the scheduler's config that says all this, where there is one; no run looks at it.
    """

    spacing: Spacing = "trailing"
    steps_offset: int = 1
    to_clean: bool = True
    family: Family = "ddim"
    teacher_steps: int | None = None
    trained_steps: int | None = None
    within: Times = "linspace"
    sigma_min: float | None = None
    sigma_max: float | None = None
    whole: bool = False
    lambda_min: float = -math.inf
    shift: float = 1.0
    from_noise: bool = False
    lowering: Lowering = "never"
    paired: bool = False
    settings: tuple[tuple[str, object], ...] = ()
    source: Mapping[str, object] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not all(isinstance(each, tuple) and len(each) == 2 for each in self.settings):
            raise UserError(
                f"settings are pairs of an argument and its value, not {self.settings}."
            )
        for name in ("teacher_steps", "trained_steps"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise UserError(f"{name} must be at least 1, not {count}.")
        for name in ("shift", "sigma_min", "sigma_max"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be a positive number, not {value}.")

    @classmethod
    def of(cls, record: object) -> Self:
        """The steps of a `record`.

        Raises:
            UserError: it is none.
        """
        if not isinstance(record, Mapping):
            raise UserError(f"a record of steps must be a JSON object, not {record!r:.60}.")
        values = {str(key): _hashable(value) for key, value in record.items()}
        for key, value in values.items():
            check_name("key of steps", key, _KINDS)
            kind = _KINDS[key]
            named = value in kind if isinstance(kind, tuple) else _is(kind, value)
            if not named:
                raise UserError(f"steps: {key} cannot be {value!r:.60}.")
        return cls(**cast(dict[str, Any], values))

    def record(self) -> dict[str, object]:
        """Settings that differ from the plain steps, as JSON."""
        plain = Steps()
        return {
            key: getattr(self, key) for key in _KINDS if getattr(self, key) != getattr(plain, key)
        }

    def plan(self, solver: str, process: Process, steps: int) -> tuple[Solver, Timetable]:
        """The model's own solver of that name, as it is set, and the levels of a run with it."""
        levels = self.timetable(process, steps)
        made: Any = self.solver(solver, process)
        if self.paired:
            blocks = _blocks(levels, lower_final=self.lowering != "never")
            return dataclasses.replace(made, inner=levels[:-1]), blocks
        if self.lowering == "always" or (self.lowering == "below 15 steps" and steps < 15):
            # Of a last step that goes nowhere, which `timetable` leaves out, the orders still know.
            missing = [process.data_level()] * (steps + 1 - len(levels))
            made = dataclasses.replace(made, ending=(*levels, *missing))
        return made, levels

    def solver(self, name: str, process: Process) -> Solver:
        """The model's own solver of that name with its settings.

        Raises:
            UserError: a setting that it does not have.
        """
        made: Any = solvers.create(name, process)
        known = {each.name for each in dataclasses.fields(made) if each.init}
        for setting, value in self.settings:
            check_name(f"setting of {name}", setting, known)
            plain = getattr(made, setting)
            if plain is not None and not _is(type(plain), value):
                raise UserError(f"{setting} of {name} cannot be {value!r:.60}.")
        return dataclasses.replace(made, **dict(self.settings))

    def to_data(self) -> Self:
        """The same times for another solver: to clean data, without the own solver's settings."""
        plain = Steps()
        own = {key: getattr(plain, key) for key in ("lowering", "paired", "settings")}
        return dataclasses.replace(self, to_clean=True, **own)

    def timetable(self, process: Process, steps: int) -> Timetable:
        """The levels of a run of so many steps; see `latentdiff.diffusion.timetable.create`.

        Without a last step that would end where it begins.

        Raises:
            UserError: more steps than there are times, or sigma_min above sigma_max.
        """
        if isinstance(process, Flow) and self.family in ("flow", "multistep"):
            levels = self._flowing(process, steps)
        elif isinstance(process, DiscreteVP) and self.teacher_steps is not None:
            times = _teachers_times(process.num_train_timesteps, steps, self.teacher_steps)
            levels = [process.level(float(t)) for t in times]
        elif isinstance(process, DiscreteVP) and self.family in ("sigma", "multistep"):
            levels = self._discrete(process, steps)
        else:
            created = timetables.create(
                self.spacing, process, steps, steps_offset=self.steps_offset
            )
            levels = list(created[:-1])
        end = process.data_level() if self.to_clean else self._last(process, levels[-1])
        moves = end.log_snr > levels[-1].log_snr + _SAME
        return (*levels, end) if moves else (*levels[:-1], end)

    def _last(self, process: Process, reached: NoiseLevel) -> NoiseLevel:
        """The end of a run that stops before clean data: the first time, or the last level."""
        if isinstance(process, Flow):
            return reached
        level = process.level(0.0 if isinstance(process, DiscreteVP) else process.t_min)
        if self.family == "sigma":  # these hold x / alpha, and hand it over as it is
            return NoiseLevel(level.t, 1.0, level.ratio)
        return level

    def meaning(self, process: Process) -> "Steps":
        """A normal form: two `Steps` that give the same runs of a process have the same."""
        plain, ramp = Steps(), self.spacing in get_args(Ramp)
        foreign = self.family in ("sigma", "multistep") and isinstance(process, DiscreteVP)
        flow = self.family in ("flow", "multistep") and isinstance(process, Flow)
        idle = set()
        if self.teacher_steps is not None:
            idle |= {"spacing", "steps_offset", "family"}
        if not (foreign or flow) or not ramp or self.teacher_steps is not None:
            idle |= {"within", "sigma_min", "sigma_max", "whole"}
        if self.family != "sigma":
            idle |= {"within"}
        if "leading" not in (self.spacing, self.within if ramp and foreign else None):
            idle |= {"steps_offset"}
        if self.spacing in ("exponential", "beta") or self.family == "flow":
            idle |= {"whole"}
        if not flow:
            idle |= {"shift", "from_noise"}
        if not foreign or self.family != "multistep" or ramp:
            idle |= {"lambda_min"}
        signal = isinstance(process, DiscreteVP) and process.level(process.t_max).alpha > 0
        if self.spacing == "trailing" and signal and self.lambda_min == -math.inf:
            idle |= {"family"}
        return dataclasses.replace(self, **{key: getattr(plain, key) for key in idle})

    def _discrete(self, process: DiscreteVP, steps: int) -> list[NoiseLevel]:
        """All levels but the last of the families "sigma" and "multistep"."""
        table = _sigma_table(process)
        if self.spacing in ("leading", "trailing", "linspace"):
            times = self._times(self.spacing, table, steps)
            return [_level_at(process, table, float(t)) for t in times]
        high, low = float(table[-1]), float(table[0])
        if self.family == "sigma":
            ends = self._times(self.within, table, steps)[[0, -1]]
            high, low = np.interp(ends, np.arange(len(table)), table).tolist()
        logs = np.log(table).astype(np.float64)
        if self.spacing == "lu":
            sigmas = np.exp(np.linspace(logs[-1], logs[0], steps))
        else:
            sigmas = self._ramp(high, low, steps)
        times = np.array([_time_of(sigma, logs) for sigma in sigmas.tolist()])
        if self.whole and self.spacing in ("karras", "lu"):
            times = times.round()
        if self.family == "multistep":
            times = np.floor(times)
        return [_level(t, s) for t, s in zip(times.tolist(), sigmas.tolist(), strict=True)]

    def _times(self, spacing: Times, table: NDArray[np.float32], steps: int) -> Floats:
        """Falling times of the family, of a schedule of this table."""
        count = len(table)
        last = count - int(np.searchsorted(-np.log(table[::-1]), self.lambda_min))
        if steps > (count if spacing == "trailing" and last else last):
            raise UserError(f"this model has {last} times, too few for {steps} steps.")
        if self.family == "sigma" and spacing == "linspace" and steps > 1:
            return np.linspace(0, count - 1, steps)[::-1]
        if self.family == "multistep" and spacing == "linspace":
            return np.linspace(0, last - 1, steps + 1).round()[:0:-1]
        if self.family == "multistep" and spacing == "leading" and steps < last:
            stride = last // (steps + 1)
            return np.arange(steps, 0, -1.0) * stride + self.steps_offset
        if self.family == "multistep" and spacing == "trailing":
            return np.arange(last, 0, -count / steps).round()[:steps] - 1
        created = timetables.whole_times(spacing, count, steps, self.steps_offset)
        return created.astype(np.float64)

    def _flowing(self, process: Flow, steps: int) -> list[NoiseLevel]:
        """All levels but the last of a rectified flow."""
        least = 1 / process.t_max
        if self.family == "flow":
            # Their first and last sigma are shifted as the scheduler is made, and here once more.
            sigmas = self._shifted(np.linspace(1, float(self._shifted(np.array(least))), steps))
            if self.spacing in ("karras", "exponential", "beta"):
                sigmas = self._ramp(float(sigmas[0]), float(sigmas[-1]), steps)
            return [process.level(float(sigma * process.t_max)) for sigma in sigmas]
        falling = np.linspace(1, least, steps + 1)
        if self.from_noise:
            sigmas = self._shifted(falling[:-1])
            sigmas[0] = min(sigmas[0], 1 - 1e-6)
        else:
            sigmas = self._shifted(1 - falling)[:0:-1]
        levels = [process.level(float(sigma * process.t_max)) for sigma in sigmas]
        return [dataclasses.replace(level, t=math.floor(level.t)) for level in levels]

    def _shifted(self, sigmas: Floats) -> Floats:
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def _ramp(self, high: float, low: float, steps: int) -> Floats:
        high = high if self.sigma_max is None else self.sigma_max
        low = low if self.sigma_min is None else self.sigma_min
        if low > high:
            raise UserError(f"sigmas must fall, not go from {high:.4g} to {low:.4g}.")
        return timetables.ramp(self.spacing, high, low, steps)


def usual_steps(process: Process) -> Steps:
    """The timetable of a new model: "karras" as diffusers spaces it, which docs/comparison.md finds
    nearest to the converged picture; "trailing" for a continuous process, and where karras would
    spend half of its steps beyond sigma / alpha = 80."""
    if isinstance(process, DiscreteVP) and process.level(process.t_max).ratio <= _KARRAS_FROM:
        return Steps("karras", family="multistep", whole=True)
    return Steps()


_KINDS: dict[str, type | tuple[str, ...]] = {
    "spacing": (*get_args(Times), *get_args(Ramp)),
    "steps_offset": int,
    "to_clean": bool,
    "family": get_args(Family),
    "teacher_steps": int,
    "trained_steps": int,
    "within": get_args(Times),
    "sigma_min": float,
    "sigma_max": float,
    "whole": bool,
    "lambda_min": float,
    "shift": float,
    "from_noise": bool,
    "lowering": get_args(Lowering),
    "paired": bool,
    "settings": tuple,
}


def _is(kind: type, value: object) -> bool:
    """True for a JSON value of this type; whole numbers count as floats, booleans as no numbers."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _hashable(value: object) -> object:
    return tuple(_hashable(part) for part in value) if isinstance(value, list) else value


def _teachers_times(count: int, steps: int, teacher: int) -> Floats:
    """Luo et al. 2023 (LCM), algorithm 3, as diffusers spaces it: falling times."""
    if steps > teacher:
        raise UserError(f"this model is distilled: it takes at most {teacher} steps, not {steps}.")
    places = np.floor(np.linspace(0, teacher, steps, endpoint=False))
    return (teacher - places) * (count // teacher) - 1


def _blocks(levels: Sequence[NoiseLevel], *, lower_final: bool) -> Timetable:
    """The levels between which DPMSolverSinglestep of order 2 makes whole steps.

    Its orders are 1, 2, 1, 2, ...: a pair is one step over two levels. The end of an odd number is
    a single step, and so are the last two of an even number, if the order shall fall.
    """
    steps = len(levels) - 1
    pairs = (steps - 1) // 2 if lower_final else steps // 2
    return (*levels[: 2 * pairs : 2], *levels[2 * pairs :])


def _sigma_table(process: DiscreteVP) -> NDArray[np.float32]:
    """sigma / alpha at each whole time with diffusers' rounding.

    Times of a ramp are rounded for the network, so that the last bit of a float32 may decide.
    """
    signal = torch.cumprod(1 - torch.from_numpy(process.betas.astype(np.float32)), 0)
    if signal[-1] == 0:
        signal[-1] = _LEAST_SIGNAL
    return (((1 - signal) / signal) ** 0.5).numpy()


def _level(t: float, ratio: float) -> NoiseLevel:
    alpha = 1 / math.hypot(1, ratio)
    return NoiseLevel(t, alpha, ratio * alpha)


def _level_at(process: DiscreteVP, table: NDArray[np.float32], t: float) -> NoiseLevel:
    """The level at a time, between whole ones even in sigma / alpha."""
    if t.is_integer() and process.level(t).alpha > 0:
        return process.level(t)
    return _level(t, float(np.interp(t, np.arange(len(table)), table)))


def _time_of(sigma: float, logs: Floats) -> float:
    """The time at which ln(sigma / alpha) has this value, between whole times even in it."""
    above = np.flatnonzero(math.log(max(sigma, 1e-10)) >= logs)
    before = min(int(above[-1]) if len(above) else 0, len(logs) - 2)
    low, high = logs[before], logs[before + 1]
    share = np.clip((low - math.log(max(sigma, 1e-10))) / (low - high), 0, 1)
    return float((1 - share) * before + share * (before + 1))

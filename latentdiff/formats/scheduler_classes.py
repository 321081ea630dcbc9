"""The scheduler classes of diffusers 0.42.1 as data: the keys of each, and what they mean here.

A key of a class's own signature is read, or without effect on its pictures, or refused unless it
has a value that works here. A key of another class, which `from_config` carries along into the
saved file, is without effect, but for the two that every ramp of sigmas asks for (`RANGE`).
`tests/pipelines/test_scheduler_classes.py` holds the signatures to those of diffusers, and
`tests/parity/test_saved_schedulers.py` holds each statement to its pictures.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from reprlib import repr as short
from typing import Literal, NamedTuple

from latentdiff.errors import UserError

Keys = Mapping[str, object]

Family = Literal["ddim", "sigma", "multistep", "flow"]
"""The way a class makes its times: see `latentdiff.formats.scheduler_steps`."""

End = Literal["clean", "sigma_min", "set_alpha_to_one", "final_sigmas_type"]
"""The end of a class's last step: always the same, or as the key of that name says."""

Lowering = Literal["never", "below 15 steps", "always"]
"""When the order of a class falls towards the end of a run that has `lower_order_final`."""


class Key(NamedTuple):
    """Stands for the value that a config gives to a key of diffusers."""

    name: str


class Row(NamedTuple):
    """A solver of ours.

    Attributes:
        solver: its name.
        when: the values of keys that mean it; of one class's rows the first that agrees counts.
        settings: its arguments other than those of its name.
    """

    solver: str
    when: Keys
    settings: Keys


def _row(solver: str, when: Keys | None = None, **settings: object) -> Row:
    return Row(solver, when or {}, settings)


@dataclass(frozen=True, slots=True)
class SchedulerClass:
    """One class.

    Attributes:
        defaults: its signature.
        rows: what it is here.
        family: of its times.
        end: of its runs.
        idle: keys of its signature without effect on pictures.
        only: values that work, of keys that are not free.
        never: values that do not work.
        clashes: values that do not work together.
        aliases: other values that the class itself takes for one of its own.
        lowering: what `lower_order_final` does.
        teacher: whether its times are chosen among `original_inference_steps`.
        ranged: the ramps that `RANGE` bounds.
        whole: whether the times of its Karras and Lu ramps are rounded; or all but those of the
            cosine schedule.
        from_noise: whether its rectified flow begins at pure noise.
        paired: whether its solver's middles are levels of the timetable.
    """

    defaults: Keys
    rows: tuple[Row, ...]
    family: Family
    end: End = "clean"
    idle: frozenset[str] = frozenset()
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    never: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    clashes: tuple[Keys, ...] = ()
    aliases: Mapping[str, Mapping[object, object]] = field(default_factory=dict)
    lowering: Lowering = "never"
    teacher: bool = False
    ranged: frozenset[str] = frozenset()
    whole: bool | Literal["not cosine"] = False
    from_noise: bool = False
    paired: bool = False


RANGE = ("sigma_min", "sigma_max")
"""Ends of a ramp of sigmas; read by classes without such arguments, too."""

_RAMPS = frozenset({"karras", "exponential", "beta"})
_BETAS: Keys = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
}
_SD_BETAS: Keys = {**_BETAS, "beta_start": 0.00085, "beta_end": 0.012}
_RAMP_KEYS: Keys = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_THRESHOLDS: Keys = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_SPACED: Keys = {
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
_FLOWING: Keys = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_IDLE_THRESHOLDS = frozenset({"dynamic_thresholding_ratio", "sample_max_value"})
_IDLE_CLIP = _IDLE_THRESHOLDS | {"clip_sample_range"}
_NO_CLIP = {"thresholding": (False,), "clip_sample": (False,)}
_FIXED = {"thresholding": (False,), "use_dynamic_shifting": (False,)}
_LEARNED = {"variance_type": ("learned", "learned_range")}
# v is that of a process whose variance is 1, which a rectified flow has not.
_FLOW_OR_OTHER: tuple[Keys, ...] = (
    {"use_flow_sigmas": True, "prediction_type": "v_prediction"},
    *({"use_flow_sigmas": True, key: True} for key in _RAMP_KEYS),
)
_FLOW_TO_SIGMA_MIN: Keys = {"use_flow_sigmas": True, "final_sigmas_type": "sigma_min"}
_RAMP_TO_SIGMA_MIN = tuple({"final_sigmas_type": "sigma_min", key: True} for key in _RAMP_KEYS)
# What their constructors make of the names of one another's methods.
_ALIASES: Mapping[str, Mapping[object, object]] = {
    "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    "algorithm_type": {"deis": "dpmsolver++"},
}

_DDIM = SchedulerClass(
    defaults={
        **_BETAS,
        **_SPACED,
        **_THRESHOLDS,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    },
    rows=(_row("ddim"),),
    family="ddim",
    end="set_alpha_to_one",
    idle=_IDLE_CLIP,
    only=_NO_CLIP,
)
_DDPM = SchedulerClass(
    defaults={
        **{key: value for key, value in _DDIM.defaults.items() if key != "set_alpha_to_one"},
        "variance_type": "fixed_small",
    },
    rows=(
        _row("ddpm", {"variance_type": "fixed_small"}),
        _row("ddpm", {"variance_type": "fixed_small_log"}),
        _row("ddpm", {"variance_type": "learned_range"}),
        _row("ddpm", {"variance_type": "fixed_large"}, variance="fixed-large"),
    ),
    family="ddim",
    idle=_IDLE_CLIP,
    only=_NO_CLIP,
)
_K_DPM_2 = SchedulerClass(
    defaults={**_SD_BETAS, **_SPACED, **_RAMP_KEYS},
    rows=(_row("dpm2"),),
    family="sigma",
    ranged=_RAMPS,
    whole=True,
)
_LCM = SchedulerClass(
    defaults={
        **_SD_BETAS,
        **_SPACED,
        **_THRESHOLDS,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "original_inference_steps": 50,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "timestep_scaling": 10.0,
        "rescale_betas_zero_snr": False,
    },
    rows=(_row("lcm", scaling=Key("timestep_scaling")),),
    family="ddim",
    idle=_IDLE_CLIP | {"set_alpha_to_one", "steps_offset", "timestep_spacing"},
    only=_NO_CLIP,
    teacher=True,
)
_FLOW_MATCH: Keys = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    **_RAMP_KEYS,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "time_shift_type": "exponential",
}
_IDLE_SHIFTS = frozenset(
    {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"}
)
_ONE_SHIFT = {
    "use_dynamic_shifting": (False,),
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
}

CLASSES: Mapping[str, SchedulerClass] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "PNDMScheduler": SchedulerClass(
        defaults={
            **_BETAS,
            **_SPACED,
            "timestep_spacing": "leading",
            "skip_prk_steps": False,
            "set_alpha_to_one": False,
        },
        rows=(_row("plms", {"skip_prk_steps": True}), _row("pndm", {"skip_prk_steps": False})),
        family="ddim",
        end="set_alpha_to_one",
    ),
    "EulerDiscreteScheduler": SchedulerClass(
        defaults={
            **_BETAS,
            **_SPACED,
            **_RAMP_KEYS,
            "interpolation_type": "linear",
            "sigma_min": None,
            "sigma_max": None,
            "timestep_type": "discrete",
            "rescale_betas_zero_snr": False,
            "final_sigmas_type": "zero",
        },
        rows=(_row("euler"),),
        family="sigma",
        end="final_sigmas_type",
        only={"interpolation_type": ("linear",), "timestep_type": ("discrete",)},
        ranged=_RAMPS,
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass(
        defaults={**_BETAS, **_SPACED, "rescale_betas_zero_snr": False},
        rows=(_row("euler-a"),),
        family="sigma",
    ),
    "HeunDiscreteScheduler": SchedulerClass(
        defaults={
            **_SD_BETAS,
            **_SPACED,
            **_RAMP_KEYS,
            "clip_sample": False,
            "clip_sample_range": 1.0,
        },
        rows=(_row("heun"),),
        family="sigma",
        idle=frozenset({"clip_sample_range"}),
        only={"clip_sample": (False,)},
        ranged=_RAMPS,
    ),
    "KDPM2DiscreteScheduler": _K_DPM_2,
    "KDPM2AncestralDiscreteScheduler": SchedulerClass(
        defaults=_K_DPM_2.defaults,
        rows=(_row("dpm2-a"),),
        family="sigma",
        ranged=_RAMPS,
        whole=True,
    ),
    "LMSDiscreteScheduler": SchedulerClass(
        defaults={**_BETAS, **_SPACED, **_RAMP_KEYS},
        rows=(_row("lms"),),
        family="sigma",
        ranged=_RAMPS - {"karras"},
    ),
    "DPMSolverSDEScheduler": SchedulerClass(
        defaults={**_SD_BETAS, **_SPACED, **_RAMP_KEYS, "noise_sampler_seed": None},
        rows=(_row("dpmpp-sde"),),
        family="sigma",
        only={"noise_sampler_seed": (None,)},
        ranged=_RAMPS - {"karras"},
    ),
    "DPMSolverMultistepScheduler": SchedulerClass(
        defaults={
            **_BETAS,
            **_SPACED,
            **_THRESHOLDS,
            **_RAMP_KEYS,
            **_FLOWING,
            "solver_order": 2,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "lower_order_final": True,
            "euler_at_final": False,
            "use_lu_lambdas": False,
            "final_sigmas_type": "zero",
            "lambda_min_clipped": -math.inf,
            "variance_type": None,
            "rescale_betas_zero_snr": False,
        },
        rows=(
            _row("dpm-solver-1", {"solver_order": 1, "algorithm_type": "dpmsolver++"}),
            _row("euler-a", {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
            _row(
                "dpmpp-2m",
                {"solver_order": 2, "algorithm_type": "dpmsolver++"},
                slope=Key("solver_type"),
            ),
            _row(
                "dpmpp-2m-sde",
                {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
                slope=Key("solver_type"),
            ),
            _row("dpmpp-3m", {"solver_order": 3, "algorithm_type": "dpmsolver++"}),
            _row("dpmpp-3m-sde", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
        ),
        family="multistep",
        end="final_sigmas_type",
        idle=_IDLE_THRESHOLDS | {"time_shift_type"},
        only={**_FIXED, "solver_type": ("midpoint", "heun")},
        never=_LEARNED,
        clashes=(
            {"solver_order": 3, "solver_type": "heun"},
            {"solver_order": 3, "euler_at_final": True, "final_sigmas_type": "sigma_min"},
            *_FLOW_OR_OTHER,
            {"use_flow_sigmas": True, "use_lu_lambdas": True},
            _FLOW_TO_SIGMA_MIN,
        ),
        aliases=_ALIASES,
        lowering="below 15 steps",
        ranged=_RAMPS,
        whole="not cosine",
    ),
    "DEISMultistepScheduler": SchedulerClass(
        defaults={
            **_BETAS,
            **_SPACED,
            **_THRESHOLDS,
            **_RAMP_KEYS,
            **_FLOWING,
            "solver_order": 2,
            "algorithm_type": "deis",
            "solver_type": "logrho",
            "lower_order_final": True,
        },
        rows=(
            _row("dpm-solver-1", {"solver_order": 1}),
            _row("deis-2", {"solver_order": 2}),
            _row("deis", {"solver_order": 3}),
        ),
        family="multistep",
        end="sigma_min",
        idle=_IDLE_THRESHOLDS | {"time_shift_type"},
        only={
            **_FIXED,
            "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"),
            "solver_type": ("logrho", "midpoint", "heun", "bh1", "bh2"),
        },
        clashes=_FLOW_OR_OTHER,
        lowering="below 15 steps",
        ranged=_RAMPS,
        whole=True,
    ),
    "DPMSolverSinglestepScheduler": SchedulerClass(
        defaults={
            **_BETAS,
            **_THRESHOLDS,
            **_RAMP_KEYS,
            **_FLOWING,
            "prediction_type": "epsilon",
            "solver_order": 2,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "lower_order_final": False,
            "final_sigmas_type": "zero",
            "lambda_min_clipped": -math.inf,
            "variance_type": None,
        },
        rows=(
            _row("dpm-solver-1", {"solver_order": 1, "algorithm_type": "dpmsolver++"}),
            _row("dpmpp-2s", {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
        ),
        family="multistep",
        end="final_sigmas_type",
        idle=_IDLE_THRESHOLDS | {"time_shift_type"},
        only={**_FIXED, "solver_type": ("midpoint",)},
        never=_LEARNED,
        clashes=(*_FLOW_OR_OTHER, _FLOW_TO_SIGMA_MIN, *_RAMP_TO_SIGMA_MIN),
        aliases=_ALIASES,
        ranged=_RAMPS,
        whole=True,
        paired=True,
    ),
    "UniPCMultistepScheduler": SchedulerClass(
        defaults={
            **_BETAS,
            **_SPACED,
            **_THRESHOLDS,
            **_RAMP_KEYS,
            **_FLOWING,
            "solver_order": 2,
            "predict_x0": True,
            "solver_type": "bh2",
            "lower_order_final": True,
            "disable_corrector": (),
            "solver_p": None,
            "final_sigmas_type": "zero",
            "rescale_betas_zero_snr": False,
            "sigma_min": None,
            "sigma_max": None,
            "shift_terminal": None,
        },
        rows=(
            _row(
                "unipc",
                {"solver_order": 2, "solver_type": "bh2"},
                uncorrected=Key("disable_corrector"),
            ),
            _row(
                "unipc-bh1",
                {"solver_order": 2, "solver_type": "bh1"},
                uncorrected=Key("disable_corrector"),
            ),
            _row(
                "unipc-3",
                {"solver_order": 3, "solver_type": "bh2"},
                uncorrected=Key("disable_corrector"),
            ),
            _row(
                "unipc",
                degree=Key("solver_order"),
                variant=Key("solver_type"),
                uncorrected=Key("disable_corrector"),
            ),
        ),
        family="multistep",
        end="final_sigmas_type",
        idle=_IDLE_THRESHOLDS | {"time_shift_type"},
        only={
            **_FIXED,
            "solver_order": (1, 2, 3),
            "solver_type": ("bh1", "bh2"),
            "predict_x0": (True,),
            "solver_p": (None,),
            "shift_terminal": (None,),
        },
        clashes=(
            {"lower_order_final": False, "final_sigmas_type": "zero"},
            *_FLOW_OR_OTHER,
            _FLOW_TO_SIGMA_MIN,
            *_RAMP_TO_SIGMA_MIN,
        ),
        aliases={"solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}},
        lowering="always",
        ranged=_RAMPS,
        whole=True,
        from_noise=True,
    ),
    "SASolverScheduler": SchedulerClass(
        defaults={
            **_BETAS,
            **_SPACED,
            **_THRESHOLDS,
            **_RAMP_KEYS,
            "use_flow_sigmas": False,
            "flow_shift": 1.0,
            "predictor_order": 2,
            "corrector_order": 2,
            "tau_func": None,
            "algorithm_type": "data_prediction",
            "lower_order_final": True,
            "lambda_min_clipped": -math.inf,
            "variance_type": None,
        },
        rows=(_row("sa-solver", noisy=(200, 800), as_in_code=True),),
        family="multistep",
        end="sigma_min",
        idle=_IDLE_THRESHOLDS | {"flow_shift"},
        only={
            "thresholding": (False,),
            **dict.fromkeys((*_RAMP_KEYS, "use_flow_sigmas"), (False,)),
            "predictor_order": (2,),
            "corrector_order": (2,),
            "tau_func": (None,),
            "algorithm_type": ("data_prediction",),
        },
        never=_LEARNED,
        lowering="always",
        whole=True,
    ),
    "LCMScheduler": _LCM,
    "TCDScheduler": SchedulerClass(
        defaults=_LCM.defaults,
        rows=(_row("tcd", whole=True),),
        family="ddim",
        end="sigma_min",
        idle=_LCM.idle | {"timestep_scaling"},
        only=_NO_CLIP,
        teacher=True,
    ),
    "FlowMatchEulerDiscreteScheduler": SchedulerClass(
        defaults={**_FLOW_MATCH, "stochastic_sampling": False},
        rows=(
            _row("euler", {"stochastic_sampling": False}),
            _row("consistency", {"stochastic_sampling": True}),
        ),
        family="flow",
        idle=_IDLE_SHIFTS,
        only=_ONE_SHIFT,
        ranged=_RAMPS,
    ),
    "FlowMatchHeunDiscreteScheduler": SchedulerClass(
        defaults={"num_train_timesteps": 1000, "shift": 1.0},
        rows=(_row("heun", velocity=True),),
        family="flow",
    ),
    "FlowMatchLCMScheduler": SchedulerClass(
        defaults={**_FLOW_MATCH, "scale_factors": None, "upscale_mode": "bicubic"},
        rows=(_row("consistency"),),
        family="flow",
        idle=_IDLE_SHIFTS | {"upscale_mode"},
        only={**_ONE_SHIFT, "scale_factors": (None,)},
        ranged=_RAMPS,
    ),
}


@cache
def known_keys() -> frozenset[str]:
    """Every key that some class of the table has."""
    return frozenset(key for kind in CLASSES.values() for key in kind.defaults) | set(RANGE)


def complete(name: str, config: Keys) -> dict[str, object]:
    """The keys that a class has, or reads, with its own defaults for those that are left out.

    Args:
        name: of the class.
        config: of a `scheduler_config.json`; keys of other classes are left out.

    Raises:
        UserError: no class of the table, or a value that does not work here.
    """
    if name not in CLASSES:
        raise UserError(f"models of {name:.60} are not supported.")
    kind = CLASSES[name]
    keys = (*kind.defaults, *(RANGE if kind.ranged else ()))
    given = {key: _plain(config.get(key, kind.defaults.get(key))) for key in keys}
    for key in given.keys() & kind.defaults.keys() - kind.idle:
        given[key] = _typed(key, given[key], kind.defaults[key])
    for key, aliases in kind.aliases.items():
        if isinstance(given[key], str):
            given[key] = aliases.get(given[key], given[key])
    for key, value in given.items():
        allowed = kind.only.get(key)
        if (allowed is not None and value not in allowed) or value in kind.never.get(key, ()):
            raise UserError(f"{name} with {_told({key: value})} does not work here{_hint(allowed)}")
    for clash in kind.clashes:
        if all(given[key] == value for key, value in clash.items()):
            raise UserError(f"{name} with {_told(clash)} does not work here.")
    return given


def solver_of(name: str, given: Keys) -> tuple[str, Keys]:
    """Our solver for the completed keys of a class, and its settings.

    Raises:
        UserError: there is none.
    """
    for row in CLASSES[name].rows:
        if all(given[key] == value for key, value in row.when.items()):
            return row.solver, {key: _value(value, given) for key, value in row.settings.items()}
    told = _told({key: given[key] for row in CLASSES[name].rows for key in row.when})
    raise UserError(f"{name} with {told} does not work here.")


def classes_of(solver: str, settings: Keys) -> list[tuple[str, dict[str, object]]]:
    """The classes that mean a solver, and the keys that say so; first those with these settings.

    Args:
        solver: a name of ours.
        settings: of it, beside its name.
    """
    same: list[tuple[str, dict[str, object]]] = []
    others: list[tuple[str, dict[str, object]]] = []
    for name, kind in CLASSES.items():
        for row in (row for row in kind.rows if row.solver == solver):
            keys = {ours: key.name for ours, key in row.settings.items() if isinstance(key, Key)}
            fixed = {ours: value for ours, value in row.settings.items() if ours not in keys}
            told = {keys[ours]: value for ours, value in settings.items() if ours in keys}
            rest = {ours: value for ours, value in settings.items() if ours not in keys}
            (same if fixed == rest else others).append((name, {**row.when, **told}))
    return same + others


def _typed(key: str, value: object, default: object) -> object:
    """Check a value by the type of its key's default: boolean, whole number, number, or list of
    whole numbers; other defaults allow any value.

    Raises:
        UserError: it is of another type.
    """
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if isinstance(default, bool):  # diffusers takes null for False
        if value not in (True, False, None):
            raise UserError(f"{key} must be true or false, not {short(value)}.")
        return bool(value)
    if isinstance(default, int):
        if number is None or not (isinstance(number, int) or number.is_integer()):
            raise UserError(f"{key} must be a whole number, not {short(value)}.")
        return int(number)
    if isinstance(default, float) and number is None:
        raise UserError(f"{key} must be a number, not {short(value)}.")
    if isinstance(default, tuple) and not (
        isinstance(value, tuple) and all(type(part) is int for part in value)
    ):
        raise UserError(f"{key} must be a list of whole numbers, not {short(value)}.")
    return value


def _value(setting: object, given: Keys) -> object:
    return given[setting.name] if isinstance(setting, Key) else setting


def _plain(value: object) -> object:
    """A value that can be hashed: a list as a tuple, an object as its text."""
    if isinstance(value, dict):
        return short(value)
    return tuple(_plain(part) for part in value) if isinstance(value, list) else value


def _told(keys: Keys) -> str:
    return " and ".join(f"{key}={short(value)}" for key, value in keys.items())


def _hint(allowed: tuple[object, ...] | None) -> str:
    return "." if allowed is None else f"; {' or '.join(repr(value) for value in allowed)} does."

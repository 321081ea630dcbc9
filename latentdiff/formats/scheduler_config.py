"""`scheduler_config.json` of diffusers: the process, the prediction, the timetable, the solver."""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentdiff import solvers
from latentdiff.diffusion import process as processes
from latentdiff.diffusion.prediction import Prediction
from latentdiff.diffusion.process import DiscreteVP, Flow, Process
from latentdiff.errors import UserError, warn
from latentdiff.formats import scheduler_classes
from latentdiff.formats.scheduler_classes import CLASSES, RANGE, Keys, Lowering, known_keys
from latentdiff.formats.scheduler_steps import Ramp, Steps, Times
from latentdiff.formats.weights import read_json
from latentdiff.registry import check_name
from latentdiff.solvers.diffusers_scheduler import PREDICTIONS

__all__ = [
    "DEFAULT_SOLVER",
    "Described",
    "Steps",
    "read",
    "read_folder",
    "read_object",
    "to_object",
    "write",
]

Described = tuple[Process, Prediction, Steps, str]
"""The process, prediction, times and name of the solver that a config describes."""

DEFAULT_SOLVER = "dpmpp-2m"
"""The solver of a model that is made here; chosen in docs/comparison.md."""

_BETAS = {
    "linear": "linear",
    "scaled_linear": "scaled-linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
_RAMPS: Mapping[Ramp, str] = {
    "karras": "use_karras_sigmas",
    "lu": "use_lu_lambdas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}
_OUR_CLASS = "LatentDiffusionProcess"
_OUR_PROCESS = "latentdiff_process"
_OUR_SOLVER = "latentdiff_solver"
_OUR_STEPS = "latentdiff_steps"

_MENDED: Keys = {"steps_offset": 1, "clip_sample": False}
MENDED: Mapping[str, Keys] = {
    "StableDiffusionPipeline": _MENDED,
    "StableDiffusionImg2ImgPipeline": _MENDED,
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
    "StableDiffusionPAGPipeline": _MENDED,
    "StableDiffusionPAGImg2ImgPipeline": _MENDED,
    "StableDiffusionPAGInpaintPipeline": _MENDED,
}
"""The values that pipelines of diffusers give to their schedulers, whatever the files say."""


def read_folder(folder: Path) -> Described:
    """Read what the scheduler of a model folder says of it.

    The class is that of the scheduler's own file. Where model_index.json names another, as after
    one of the two was exchanged alone, diffusers takes that; a warning says so.

    Raises:
        UserError: a file is missing or damaged, or see `read`.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    config, index = read_json(path), read_json(folder / "model_index.json")
    entry, own = index.get("scheduler"), config.get("_class_name")
    named = entry[-1] if isinstance(entry, list) and entry else None
    if named is not None and own not in (None, named):
        warn(
            f"{path}: it is of {own!s:.60}, which is taken; diffusers takes {named!s:.60}, as "
            "model_index.json says."
        )
    return read(config, str(path), pipeline=str(index.get("_class_name")))


def read_object(scheduler: object) -> Described:
    """Read what a scheduler object of diffusers says of the model that it samples.

    Raises:
        UserError: no such object, or see `read`.
    """
    config, name = getattr(scheduler, "config", None), type(scheduler).__name__
    if not isinstance(config, Mapping):
        raise UserError(f"scheduler: give a scheduler object of diffusers, not {name}.")
    return read({**config, "_class_name": name}, "scheduler", pipeline="")


def to_object(described: Described, *, learned_variance: bool = False) -> Any:
    """Make the scheduler object of diffusers that a config describes.

    Raises:
        UserError: diffusers has not this process.
    """
    source = described[2].source
    if source is not None and not _ours(source) and _means(source, described, ""):
        config = dict(source)  # `from_config` of another class looks at what it leaves out
    else:
        config = write(*described, learned_variance=learned_variance)
    if config["_class_name"] == _OUR_CLASS:
        raise UserError("scheduler: diffusers has no scheduler for the process of this model.")
    kind = getattr(importlib.import_module("diffusers"), str(config["_class_name"]))
    told = {key: value for key, value in config.items() if not key.startswith("latentdiff_")}
    return kind.from_config(told)


def _is_own(key: str) -> bool:
    """True for keys that are no setting of a class: diffusers' notes, and ours."""
    return key.startswith(("_", "latentdiff_"))


def _ours(config: Keys) -> bool:
    return any(key.startswith("latentdiff_") for key in config)


def read(config: Keys, name: str, *, pipeline: str = "StableDiffusionPipeline") -> Described:
    """Read what a scheduler's config says of the model.

    Keys of a class that are left out have that class's defaults; keys of other classes have no
    effect, and those of none are warned of. See `latentdiff.formats.scheduler_classes`.

    Args:
        config: of any class of that table.
        name: of its file, for messages.
        pipeline: class of diffusers that the model's folder names: see `MENDED`.

    Raises:
        UserError: a class, a value or a combination that does not work here; the message names it.
    """
    used = config.get("_use_default_values") or []
    if not isinstance(used, list) or not all(isinstance(key, str) for key in used):
        raise UserError(f"{name}: _use_default_values must be a list of keys, not {short(used)}.")
    if "" in config:
        raise UserError(f"{name}: it has a key without a name, '': take it out.")
    config = {key: value for key, value in config.items() if key not in used}
    for key, value in config.items():
        if value and key not in known_keys() and not _is_own(key):
            warn(f"{name}: no scheduler class here knows {short(key)}.")
    config = {**config, **MENDED.get(pipeline, {})}
    try:
        process, prediction, steps, solver = _read(config)
        steps.solver(solver, process)  # raises on a setting that it does not have
    except RecursionError as error:
        raise UserError(f"{name}: a value is nested too deep.") from error
    except (TypeError, ValueError, OverflowError) as error:  # UserError is a ValueError
        raise UserError(f"{name}: {error}") from error
    return process, prediction, dataclasses.replace(steps, source=config), solver


def _read(config: Keys) -> Described:
    kind = str(config.get("_class_name", "no scheduler class"))
    ours = config.get(_OUR_SOLVER)
    if kind == _OUR_CLASS:
        process = _own_process(config)
        prediction = _prediction(config.get("prediction_type", "epsilon"))
        steps, solver = _own_steps(config), DEFAULT_SOLVER
    else:
        given = scheduler_classes.complete(kind, config)
        flow = CLASSES[kind].family == "flow" or bool(given.get("use_flow_sigmas"))
        process = _read_process(given, flow=flow)
        prediction = _read_prediction(kind, config, given)
        solver, settings = scheduler_classes.solver_of(kind, given)
        steps = _read_steps(kind, given, solver, settings, process)
        if ours is not None:  # the class's own settings are another solver's
            steps = dataclasses.replace(steps.to_data(), to_clean=steps.to_clean)
    if ours is not None:
        check_name("solver", str(ours), solvers.names())
        solver = str(ours)
    if (record := config.get(_OUR_STEPS)) is not None:
        steps = Steps.of(record)
    return process, prediction, steps, solver


def _prediction(kind: object) -> Prediction:
    if kind not in PREDICTIONS:
        raise UserError(f"unknown prediction_type '{kind!s:.60}'.")
    return PREDICTIONS[str(kind)]


def _read_prediction(kind: str, config: Keys, given: Keys) -> Prediction:
    if "prediction_type" in given:
        return _prediction(given["prediction_type"])
    told = _prediction(config.get("prediction_type", "flow_prediction"))
    if told != "flow" and _OUR_SOLVER not in config:
        raise UserError(
            f"{kind} with prediction_type='{config['prediction_type']!s:.60}' does not work here; "
            "its networks predict flow."
        )
    return told


def _read_process(given: Keys, *, flow: bool) -> Process:
    count = _number(given, "num_train_timesteps")
    if count < 1:
        raise UserError(f"num_train_timesteps must be at least 1, not {count}.")
    if flow:
        return Flow(t_max=count)
    trained = given["trained_betas"]
    if isinstance(trained, tuple) and trained:
        betas = np.asarray(trained, dtype=np.float64)
        if len(trained) != count:
            raise UserError(f"num_train_timesteps is {count}, but trained_betas {len(trained)}.")
    else:
        betas = _betas(given, int(count))
    if given.get("rescale_betas_zero_snr"):
        betas = processes.zero_terminal_snr(betas)
    return DiscreteVP(betas)


def _betas(given: Keys, count: int) -> NDArray[np.float64]:
    schedule = given["beta_schedule"]
    if schedule not in _BETAS:
        raise UserError(f"unknown beta_schedule '{schedule!s:.60}'.")
    if schedule == "squaredcos_cap_v2":  # its ends are fixed, whatever beta_start says
        return processes.beta_schedule("cosine", count)
    start, end = _number(given, "beta_start"), _number(given, "beta_end")
    return processes.beta_schedule(_BETAS[str(schedule)], count, start, end)


def _number(given: Keys, key: str) -> float:
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e6:
        raise UserError(f"{key} must be a sensible number, not {short(value)}.")
    return value


def _read_steps(name: str, given: Keys, solver: str, settings: Keys, process: Process) -> Steps:
    """The timetable of a class, and the settings of its solver."""
    kind = CLASSES[name]
    if kind.family == "flow" and isinstance(process, Flow) and process.t_max <= 1:
        return Steps()  # of ours, from before they had times up to 1000
    times = _times(given.get("timestep_spacing", "linspace"))
    ramp: Ramp | None = next((ramp for ramp, key in _RAMPS.items() if given.get(key)), None)
    clean = _to_clean(name, given)
    cosine = kind.whole == "not cosine" and given["beta_schedule"] == "squaredcos_cap_v2"
    teacher = _teacher(given) if kind.teacher else None
    flowing = "shift" if "shift" in given else "flow_shift"
    return Steps(
        spacing=ramp or times,
        steps_offset=_offset(given) if "steps_offset" in given else 1,
        to_clean=clean,
        family=kind.family,
        teacher_steps=teacher,
        within=times,
        **(_range(name, given, process, to_clean=clean) if ramp in kind.ranged else {}),
        whole=bool(kind.whole) and not cosine,
        lambda_min=_lambda_min(given, process),
        shift=_number(given, flowing) if isinstance(process, Flow) else 1.0,
        from_noise=kind.from_noise,
        lowering=_lowering(name, given, to_clean=clean),
        paired=kind.paired and given["solver_order"] == 2,
        settings=_own_settings(solver, settings, process),
    )


def _teacher(given: Keys) -> int:
    """Number of steps that the teacher of a distilled model made: at most one for each time."""
    steps, times = (_number(given, k) for k in ("original_inference_steps", "num_train_timesteps"))
    if not 1 <= steps <= times:
        raise UserError(f"original_inference_steps must be 1 .. {times}, not {steps}.")
    return int(steps)


def _offset(given: Keys) -> int:
    offset = _number(given, "steps_offset")
    if offset < 0:
        raise UserError(f"steps_offset must be at least 0, not {offset}.")
    return int(offset)


def _lambda_min(given: Keys, process: Process) -> float:
    if given.get("lambda_min_clipped", -np.inf) == -np.inf:
        return -np.inf
    least = _number(given, "lambda_min_clipped")
    if isinstance(process, DiscreteVP) and least > process.level(0).log_snr / 2:
        raise UserError(f"lambda_min_clipped={least} leaves no time to begin at.")
    return least


def _range(name: str, given: Keys, process: Process, *, to_clean: bool) -> dict[str, Any]:
    """Ends of a ramp of sigmas, as far as the config gives them."""
    ends = {key: _number(given, key) for key in RANGE if given.get(key) is not None}
    for key, value in ends.items():
        if isinstance(process, Flow) and value > 1:
            raise UserError(f"{name} with {key}={value} does not work here: a flow's end at 1.")
        if key == "sigma_min" and not to_clean:
            raise UserError(f"{name} with {key}={value} works here to clean data alone.")
    return ends


def _times(spacing: object) -> Times:
    for times in ("leading", "trailing", "linspace"):
        if spacing == times:
            return times
    raise UserError(f"unknown timestep_spacing '{spacing!s:.60}'.")


def _to_clean(name: str, given: Keys) -> bool:
    end = CLASSES[name].end
    if end == "set_alpha_to_one":
        return bool(given[end])
    if end == "final_sigmas_type":
        if given[end] not in ("zero", "sigma_min"):
            raise UserError(f"unknown final_sigmas_type '{given[end]!s:.60}'.")
        return given[end] == "zero"
    return end == "clean"


def _lowering(name: str, given: Keys, *, to_clean: bool) -> Lowering:
    """When the order of the class's solver is lowered; "never" where that changes nothing."""
    kind, order = CLASSES[name], given.get("solver_order", 2)
    if kind.paired and order == 2:
        return "always" if to_clean or given["lower_order_final"] else "never"
    if order == 1 or (order == 2 and to_clean):  # a step to clean data is of first order anyway
        return "never"
    if given.get("euler_at_final"):
        return "always"
    return kind.lowering if given.get("lower_order_final") else "never"


def _own_settings(solver: str, settings: Keys, process: Process) -> tuple[tuple[str, object], ...]:
    """The settings in which the class's solver differs from ours of the same name."""
    made = solvers.create(solver, process)
    return tuple(pair for pair in settings.items() if getattr(made, pair[0]) != pair[1])


def _own_process(config: Keys) -> Process:
    process = processes.create(str(config.get(_OUR_PROCESS)))
    if isinstance(process, Flow) and "num_train_timesteps" in config:
        return Flow(t_max=_number(config, "num_train_timesteps"))
    return process


def _own_steps(config: Keys) -> Steps:
    """The steps of an old config of our own class, which holds no record of them."""
    ramp: Ramp | None = next((ramp for ramp, key in _RAMPS.items() if config.get(key)), None)
    clean = config.get("set_alpha_to_one", True) is True
    clean &= config.get("final_sigmas_type", "zero") == "zero"
    return Steps(ramp or _times(config.get("timestep_spacing", "trailing")), to_clean=clean)


def write(
    process: Process,
    prediction: Prediction,
    steps: Steps,
    solver: str = DEFAULT_SOLVER,
    *,
    learned_variance: bool = False,
) -> dict[str, object]:
    """The config that `read` understands, and diffusers too where it has the process.

    It names diffusers' class of the solver where there is one, else one that can hold the process
    and the times; what that class cannot say stands in keys of our own. With a learned variance it
    is DDPM, which alone takes a network of 2C outputs.

    Raises:
        UserError: a process with settings of its own that no config can hold.
    """
    theirs = isinstance(process, DiscreteVP)
    if isinstance(process, Flow):  # theirs count whole times
        theirs = prediction == "flow" and float(process.t_max).is_integer()
    if not isinstance(process, DiscreteVP | Flow) or not theirs:
        kinds = {ours: theirs for theirs, ours in PREDICTIONS.items()}
        told = {"prediction_type": kinds[prediction], **_write_own(process)}
        record = {_OUR_SOLVER: solver, _OUR_STEPS: steps.record()}
        return {"_class_name": _OUR_CLASS, **told, **record}
    described = process, prediction, steps, solver
    written = _candidates(process, prediction, steps, solver, learned_variance=learned_variance)
    for config in written:
        if _read_or_none(config) is not None and _means(config, described):
            return config
    config = next(config for config in written if _read_or_none(config) is not None)
    if read(config, "")[3] != solver:
        config[_OUR_SOLVER] = solver
    if not _means(config, described):
        config[_OUR_STEPS] = steps.record()
    return config


def _candidates(
    process: DiscreteVP | Flow,
    prediction: Prediction,
    steps: Steps,
    solver: str,
    *,
    learned_variance: bool,
) -> list[dict[str, object]]:
    """Configs of the classes of this solver, and of one that can stand in for it."""
    told: list[tuple[str, Keys]] = []
    if learned_variance:
        told = [("DDPMScheduler", {"variance_type": "learned_range"})]
    elif isinstance(process, Flow) or prediction in ("eps", "x0", "v"):
        told = [
            (name, {**keys, "lower_order_final": lowers})
            for name, keys in scheduler_classes.classes_of(solver, dict(steps.settings))
            if _can_hold(name, process, steps)
            for lowers in (steps.lowering != "never", True)
        ]
    if not learned_variance:
        told.append((_stand_in(process, steps), {}))
    offered = _offered(process, prediction, steps)
    return [_config(name, {**offered, **keys}) for name, keys in told]


def _offered(process: DiscreteVP | Flow, prediction: Prediction, steps: Steps) -> Keys:
    """Every key of any class that tells a process, a prediction or times."""
    kinds = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    ramp = {name: key for name, key in _RAMPS.items() if name == steps.spacing}
    final = "zero" if steps.to_clean else "sigma_min"
    return {
        **_write_process(process),
        "prediction_type": kinds[prediction],
        "timestep_spacing": steps.within if ramp else steps.spacing,
        "steps_offset": steps.steps_offset,
        "set_alpha_to_one": steps.to_clean,
        "final_sigmas_type": final,
        "clip_sample": False,
        "original_inference_steps": steps.teacher_steps or 50,
        **dict.fromkeys(ramp.values(), True),
        "sigma_min": steps.sigma_min,
        "sigma_max": steps.sigma_max,
        **({"lambda_min_clipped": steps.lambda_min} if steps.lambda_min > -np.inf else {}),
        "lower_order_final": steps.lowering != "never" or steps.to_clean,
        "use_flow_sigmas": isinstance(process, Flow),
        "shift": steps.shift,
        "flow_shift": steps.shift,
    }


def _config(name: str, offered: Keys) -> dict[str, object]:
    """A config of a class: of the offered keys, those that the class has."""
    defaults = CLASSES[name].defaults
    kept = {key: value for key, value in offered.items() if key in defaults}
    extra = {key: offered[key] for key in RANGE if CLASSES[name].ranged and offered[key]}
    return {"_class_name": name, **kept, **extra}


def _can_hold(name: str, process: Process, steps: Steps) -> bool:
    """True if the class is one of such processes and times, and needs no further package."""
    kind = CLASSES[name]
    if name == "DPMSolverSDEScheduler":
        return False
    if isinstance(process, Flow):
        family = "flow" if steps.family == "ddim" else steps.family
        return kind.family == family and (family == "flow" or "use_flow_sigmas" in kind.defaults)
    return kind.family != "flow"


def _stand_in(process: Process, steps: Steps) -> str:
    """A class for a solver that diffusers has not."""
    if isinstance(process, Flow):
        return "FlowMatchEulerDiscreteScheduler"
    if steps.teacher_steps is not None:
        return "LCMScheduler"
    if steps.family == "sigma":
        return "EulerDiscreteScheduler"
    if steps.family == "multistep" or steps.spacing in _RAMPS:
        return "DPMSolverMultistepScheduler"
    return "DDIMScheduler"


def _read_or_none(config: Keys) -> Described | None:
    """Read a config; None if its class does not allow this combination of keys."""
    try:
        return read(config, "")
    except UserError:
        return None


def _means(config: Keys, described: Described, pipeline: str = "StableDiffusionPipeline") -> bool:
    """True if a config, in a folder of this pipeline of diffusers, describes exactly this model."""
    process, prediction, steps, solver = described
    # Whoever read the file was told of keys that no class knows.
    told = {key: value for key, value in config.items() if key in known_keys() or _is_own(key)}
    again, kind, steps_again, solver_again = read(told, "", pipeline=pipeline)
    same = type(again) is type(process) and kind == prediction and solver_again == solver
    if isinstance(process, DiscreteVP) and isinstance(again, DiscreteVP):
        same &= process.num_train_timesteps == again.num_train_timesteps
        same = same and bool(np.allclose(process.betas, again.betas, rtol=1e-9, atol=0))
    else:
        same &= vars(process) == vars(again)
    return same and steps.meaning(process) == steps_again.meaning(process)


def _write_process(process: DiscreteVP | Flow) -> Keys:
    if isinstance(process, DiscreteVP):
        return {"num_train_timesteps": process.num_train_timesteps, **_write_betas(process.betas)}
    return {"num_train_timesteps": _whole(process.t_max)}


def _write_own(process: Process) -> Keys:
    for name in processes.names():
        known = processes.create(name)
        if isinstance(process, Flow) and isinstance(known, Flow):
            return {_OUR_PROCESS: name, "num_train_timesteps": _whole(process.t_max)}
        if type(known) is type(process) and vars(known) == vars(process):
            return {_OUR_PROCESS: name}
    raise UserError(f"{process} has settings of its own, which a model folder cannot hold.")


def _whole(count: float) -> float:
    return int(count) if count.is_integer() else count


def _write_betas(betas: NDArray[np.float64]) -> Keys:
    """The betas as keys of diffusers: a named schedule with its two ends where that gives the same
    numbers, else the whole list."""
    ends = {"beta_start": float(f"{betas[0]:.12g}"), "beta_end": float(f"{betas[-1]:.12g}")}
    for schedule in ("scaled_linear", "linear"):
        for zero, given in (
            (False, ends),
            (True, {"beta_start": 0.00085, "beta_end": 0.012}),
            (True, {"beta_start": 1e-4, "beta_end": 0.02}),
        ):
            config = {"beta_schedule": schedule, **given, "rescale_betas_zero_snr": zero}
            if _same(config, betas):
                return config
    for zero in (False, True):
        config = {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": zero}
        if _same(config, betas):
            return config
    return {"trained_betas": betas.tolist()}


def _same(config: Keys, betas: NDArray[np.float64]) -> bool:
    made = _betas(config, len(betas))
    if config["rescale_betas_zero_snr"]:
        made = processes.zero_terminal_snr(made)
    return bool(np.allclose(made, betas, rtol=1e-9, atol=0))

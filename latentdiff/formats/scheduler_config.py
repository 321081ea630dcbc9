"""`scheduler_config.json` of diffusers: the process, the prediction, the timetable, the solver."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from latentdiff.diffusion import process as processes
from latentdiff.diffusion import timetable as timetables
from latentdiff.diffusion.prediction import Prediction
from latentdiff.diffusion.process import DiscreteVP, Flow, Process
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.formats import scheduler_classes
from latentdiff.registry import check_name
from latentdiff.solvers import names as solver_names

Spacing = Literal["leading", "trailing", "linspace", "karras", "exponential"]

# Where diffusers differs from itself: multistep schedulers space n + 1 times and drop the last,
# and schedulers in sigma do not round the times of "linspace".
Family = Literal["ddim", "sigma", "multistep"]

_FAMILIES: dict[str, Family] = {
    "EulerDiscreteScheduler": "sigma",
    "EulerAncestralDiscreteScheduler": "sigma",
    "HeunDiscreteScheduler": "sigma",
    "KDPM2DiscreteScheduler": "sigma",
    "KDPM2AncestralDiscreteScheduler": "sigma",
    "LMSDiscreteScheduler": "sigma",
    "DPMSolverMultistepScheduler": "multistep",
    "DPMSolverSinglestepScheduler": "multistep",
    "DEISMultistepScheduler": "multistep",
    "UniPCMultistepScheduler": "multistep",
}
_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
    "score": "score",
}
_BETAS = {
    "linear": "linear",
    "scaled_linear": "scaled-linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
_OUR_PROCESS = "latentdiff_process"
_OUR_SOLVER = "latentdiff_solver"

DEFAULT_SOLVER = "dpmpp-2m"
"""Of a model whose config names none that we know; chosen in docs/comparison.md."""

# Classes whose process is none of ours, or whose config does not say it.
_UNREADABLE = ("EDM", "CMStochasticIterative", "Cosine", "ScoreSde", "KarrasVe", "UnCLIP")
# Their teacher's number of steps, out of whose times theirs are taken.
_DISTILLED = {"LCMScheduler": 50, "TCDScheduler": 50}


@dataclass(frozen=True, slots=True)
class Steps:
    """The timetable that a model's makers meant it to be sampled with.

    Attributes:
        spacing: spacing of the times.
        steps_offset: added to the times of "leading".
        to_clean: whether the last step goes to clean data, or only to the first time's noise.
        family: the family of diffusers schedulers whose reading of `spacing` applies.
        teacher_steps: of a model distilled for few steps (LCM, TCD), how many its teacher made:
            its times are evenly chosen among the teacher's.
    """

    spacing: Spacing = "trailing"
    steps_offset: int = 1
    to_clean: bool = True
    family: Family = "ddim"
    teacher_steps: int | None = None

    def timetable(self, process: Process, steps: int) -> Timetable:
        """The levels of a run of so many steps; see `latentdiff.diffusion.timetable.create`."""
        levels = timetables.create(self.spacing, process, steps, steps_offset=self.steps_offset)
        if not isinstance(process, DiscreteVP):
            return levels
        if (times := self._times(process.num_train_timesteps, steps)) is not None:
            levels = [*(process.level(float(t)) for t in times[::-1]), levels[-1]]
        return levels if self.to_clean else [*levels[:-1], process.level(0.0)]

    def meaning(self) -> tuple[object, ...]:
        """A key that is equal for two that give the same timetables."""
        if self.teacher_steps is not None:
            return self.teacher_steps, self.to_clean
        family = self.family if self.spacing in ("leading", "linspace") else None
        offset = self.steps_offset if self.spacing == "leading" else None
        return self.spacing, offset, self.to_clean, family

    def _times(self, count: int, steps: int) -> NDArray[np.float64] | None:
        """Increasing times, where the family differs from what DDIM visits."""
        if self.teacher_steps is not None:
            return _teachers_times(count, steps, self.teacher_steps)
        if self.family == "multistep" and self.spacing == "leading" and steps < count:
            return np.arange(1.0, steps + 1) * (count // (steps + 1)) + self.steps_offset
        if self.family == "multistep" and self.spacing == "linspace":
            return np.round(np.linspace(0, count - 1, steps + 1))[1:]
        if self.family == "sigma" and self.spacing == "linspace" and steps > 1:
            return np.linspace(0, count - 1, steps)
        return None


def _teachers_times(count: int, steps: int, teacher: int) -> NDArray[np.float64]:
    """Luo et al. 2023 (LCM), algorithm 3, as diffusers spaces it: increasing times."""
    if steps > teacher:
        raise UserError(f"this model is distilled: it takes at most {teacher} steps, not {steps}.")
    places = np.floor(np.linspace(0, teacher, steps, endpoint=False))
    return ((teacher - places) * (count // teacher) - 1)[::-1]


def read(config: Mapping[str, object], name: str) -> tuple[Process, Prediction, Steps, str]:
    """Read process, prediction, steps and solver name from a diffusers scheduler config.

    A config that names no solver gets `DEFAULT_SOLVER`.

    Args:
        config: the config of any diffusers scheduler for Stable Diffusion 1 and 2.
        name: the name of its file, for messages.

    Raises:
        UserError: the config asks for a process, prediction or spacing that does not exist here.
    """
    flow = _is_flow(config)
    kind = str(config.get("prediction_type") or ("flow_prediction" if flow else "epsilon"))
    if kind not in _PREDICTIONS:
        raise UserError(f"{name}: unknown prediction_type '{kind}'.")
    if config.get("variance_type") == "learned":
        raise UserError(f"{name}: only the variance_type learned_range works here.")
    try:
        solver = str(config.get(_OUR_SOLVER) or scheduler_classes.read(config) or DEFAULT_SOLVER)
        check_name("solver", solver, solver_names())
        return _read_process(config), _PREDICTIONS[kind], _read_steps(config), solver
    except (TypeError, ValueError) as error:  # UserError is a ValueError
        raise UserError(f"{name}: {error}") from error


def _is_flow(config: Mapping[str, object]) -> bool:
    named = str(config.get("_class_name")).startswith("FlowMatch")
    return named or config.get("use_flow_sigmas") is True


def _read_process(config: Mapping[str, object]) -> Process:
    if (ours := config.get(_OUR_PROCESS)) is not None:
        return processes.create(str(ours))
    if (kind := str(config.get("_class_name"))).startswith(_UNREADABLE):
        raise UserError(f"models of {kind} are not supported.")
    count = _number(config, "num_train_timesteps", 1000)
    if _is_flow(config):
        return Flow(t_max=count)
    trained = config.get("trained_betas")
    if isinstance(trained, list) and trained:
        betas = np.asarray(trained, dtype=np.float64)
    else:
        betas = _betas(config, int(count))
    if config.get("rescale_betas_zero_snr") is True:
        betas = processes.zero_terminal_snr(betas)
    return DiscreteVP(betas)


def _betas(config: Mapping[str, object], count: int) -> NDArray[np.float64]:
    schedule = str(config.get("beta_schedule") or "linear")
    if schedule not in _BETAS:
        raise UserError(f"unknown beta_schedule '{schedule}'.")
    if schedule == "squaredcos_cap_v2":  # its ends are fixed, whatever beta_start says
        return processes.beta_schedule("cosine", count)
    start = _number(config, "beta_start", 1e-4)
    end = _number(config, "beta_end", 0.02)
    return processes.beta_schedule(_BETAS[schedule], count, start, end)


def _number(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e6:
        raise UserError(f"{key} must be a sensible number, not {value!s:.40}.")
    return value


def _read_steps(config: Mapping[str, object]) -> Steps:
    family = _FAMILIES.get(str(config.get("_class_name")), "ddim")
    customary = "leading" if family == "ddim" else "linspace"
    wanted = str(config.get("timestep_spacing") or customary)
    if _is_flow(config):
        wanted = "trailing"
    elif config.get("use_karras_sigmas") is True:
        wanted = "karras"
    elif config.get("use_exponential_sigmas") is True:
        wanted = "exponential"
    # StableDiffusionPipeline, too, takes an offset of 0 for an outdated config that means 1.
    offset = int(_number(config, "steps_offset", 1)) or 1
    clean = config.get("set_alpha_to_one", True) is True
    clean &= config.get("final_sigmas_type", "zero") == "zero"
    teacher = _DISTILLED.get(str(config.get("_class_name")))
    if teacher is not None:
        teacher = int(_number(config, "original_inference_steps", teacher))
    for spacing in get_args(Spacing):
        if wanted == spacing:
            return Steps(spacing, offset, clean, family, teacher)
    raise UserError(f"unknown timestep_spacing '{wanted}'.")


def write(
    process: Process,
    prediction: Prediction,
    steps: Steps,
    solver: str = DEFAULT_SOLVER,
    *,
    learned_variance: bool = False,
) -> dict[str, object]:
    """The config that `read` understands, and diffusers too where it has the process.

    It names diffusers' class of the solver where that can hold all the rest; else one that can, and
    the solver in a key of our own. With a learned variance it is of diffusers' DDPM, which alone
    takes a network of 2C outputs.

    Raises:
        UserError: a process with settings of its own that no config can hold.
    """
    kinds = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    config: dict[str, object] = {
        "_class_name": "DDIMScheduler",
        "prediction_type": kinds[prediction],
        "timestep_spacing": steps.spacing,
        "steps_offset": steps.steps_offset,
        "set_alpha_to_one": steps.to_clean,
        "clip_sample": False,
    }
    told = _write_process(process)
    theirs = None if learned_variance else _as_theirs(config | told, process, steps, solver)
    if theirs is not None and _means(theirs, process, prediction, steps, solver):
        return theirs
    if steps.family != "ddim" or steps.spacing in ("karras", "exponential"):
        config = _multistep(config, steps)
    elif learned_variance:
        config["_class_name"] = "DDPMScheduler"
        if steps.to_clean:  # as that always does
            del config["set_alpha_to_one"]
    elif steps.teacher_steps is not None:
        distilled = {"_class_name": "LCMScheduler", "original_inference_steps": steps.teacher_steps}
        config |= distilled
    if learned_variance:
        config["variance_type"] = "learned_range"
    config |= told
    return config if scheduler_classes.read(config) == solver else config | {_OUR_SOLVER: solver}


def _as_theirs(
    config: dict[str, object], process: Process, steps: Steps, solver: str
) -> dict[str, object] | None:
    """Diffusers' class of the solver, with all the keys that it takes."""
    try:
        keys = scheduler_classes.write(solver, flow=isinstance(process, Flow))
    except UserError:
        return None
    offered = config | {"final_sigmas_type": "zero" if steps.to_clean else "sigma_min"}
    if steps.spacing in ("karras", "exponential"):
        offered |= {f"use_{steps.spacing}_sigmas": True, "timestep_spacing": "linspace"}
    if steps.teacher_steps is not None:
        offered |= {"original_inference_steps": steps.teacher_steps, "timestep_spacing": "leading"}
    kind = getattr(importlib.import_module("diffusers"), str(keys["_class_name"]))
    taken = inspect.signature(kind.__init__).parameters
    return keys | {key: value for key, value in (offered | keys).items() if key in taken}


def _means(
    config: dict[str, object], process: Process, prediction: Prediction, steps: Steps, solver: str
) -> bool:
    """Tell whether `read` turns the config back into the same process, steps and solver."""
    again, kind, steps_again, solver_again = read(config, "")
    same = type(again) is type(process) and kind == prediction and solver_again == solver
    if isinstance(process, DiscreteVP) and isinstance(again, DiscreteVP):
        same &= process.num_train_timesteps == again.num_train_timesteps
        same = same and bool(np.allclose(process.betas, again.betas, rtol=1e-9, atol=0))
    else:
        same &= vars(process) == vars(again)
    return same and steps.meaning() == steps_again.meaning()


def _multistep(config: dict[str, object], steps: Steps) -> dict[str, object]:
    """The same for diffusers' schedulers in sigma, whose keys are others."""
    kept = {key: config[key] for key in ("prediction_type", "timestep_spacing", "steps_offset")}
    kind = "EulerDiscrete" if steps.family == "sigma" else "DPMSolverMultistep"
    if steps.spacing in ("karras", "exponential"):
        kept[f"use_{steps.spacing}_sigmas"] = True
        kept["timestep_spacing"] = "linspace"
    last = "zero" if steps.to_clean else "sigma_min"
    return {"_class_name": f"{kind}Scheduler", "final_sigmas_type": last, **kept}


def _write_process(process: Process) -> dict[str, object]:
    if isinstance(process, DiscreteVP):
        return {"num_train_timesteps": process.num_train_timesteps, **_write_betas(process.betas)}
    if isinstance(process, Flow):
        count = int(process.t_max) if process.t_max.is_integer() else process.t_max
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": count}
    for name in processes.names():
        known = processes.create(name)
        if type(known) is type(process) and vars(known) == vars(process):
            return {"_class_name": "LatentDiffusionProcess", _OUR_PROCESS: name}
    raise UserError(f"{process} has settings of its own, which a model folder cannot hold.")


def _write_betas(betas: NDArray[np.float64]) -> dict[str, object]:
    """A name of diffusers and two ends where that gives the same betas, else all of them."""
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


def _same(config: dict[str, object], betas: NDArray[np.float64]) -> bool:
    made = _betas(config, len(betas))
    if config["rescale_betas_zero_snr"]:
        made = processes.zero_terminal_snr(made)
    return bool(np.allclose(made, betas, rtol=1e-9, atol=0))

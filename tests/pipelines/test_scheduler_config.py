"""`scheduler_config.json`: the same process and the same times as diffusers makes of it."""

import json
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentdiff import solvers
from latentdiff.diffusion import process as processes
from latentdiff.diffusion.process import DiscreteVP, Flow, beta_schedule
from latentdiff.errors import UserError
from latentdiff.formats import scheduler_config as scheduler
from latentdiff.formats.scheduler_classes import classes_of
from latentdiff.formats.scheduler_config import Steps
from latentdiff.formats.scheduler_steps import usual_steps

BASE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
CONFIGS: list[dict[str, Any]] = [
    {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "set_alpha_to_one": False},
    {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "prediction_type": "v_prediction"},
    {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"},
    {
        "_class_name": "DDIMScheduler",
        "trained_betas": [0.01, 0.02, 0.3],
        "num_train_timesteps": 3,
    },
    {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
    },
]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_process_is_diffusers_own(config: dict[str, Any]) -> None:
    theirs = getattr(diffusers, config["_class_name"]).from_config(BASE | config)
    process, prediction, steps, _ = scheduler.read(BASE | config, "scheduler_config.json")
    assert isinstance(process, DiscreteVP)
    assert np.abs(process.alphas_cumprod - theirs.alphas_cumprod.double().numpy()).max() < 2e-5
    assert prediction == {"epsilon": "eps", "v_prediction": "v"}[theirs.config.prediction_type]
    assert steps.to_clean == theirs.config.set_alpha_to_one


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_the_times_are_diffusers_own(kind: str, spacing: str) -> None:
    config = BASE | {"_class_name": f"{kind}Scheduler", "timestep_spacing": spacing}
    theirs = getattr(diffusers, f"{kind}Scheduler").from_config(config)
    process, _, steps, _ = scheduler.read(config, "scheduler_config.json")
    for count in (1, 2, 7, 20, 50, 333):
        theirs.set_timesteps(count)
        ours = [level.t for level in steps.timetable(process, count)[:-1]]
        # diffusers sets the one step of these at the data, where there is nothing to do.
        if spacing == "linspace" and count == 1 and kind in ("DDIM", "EulerDiscrete"):
            assert ours == [999.0]
        else:
            torch.testing.assert_close(torch.tensor(ours), theirs.timesteps.float())


RAMPED = ("EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete", "DEISMultistep")
RAMPED += ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep")


@pytest.mark.parametrize("ramp", ["karras_sigmas", "exponential_sigmas", "beta_sigmas"])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("kind", RAMPED)
def test_the_ramps_are_diffusers_own(kind: str, schedule: str, ramp: str) -> None:
    """Also the times, rounded in one way or another, that the network is told."""
    config = BASE | {"_class_name": f"{kind}Scheduler", "beta_schedule": schedule}
    config |= {f"use_{ramp}": True, "timestep_spacing": "leading"}
    theirs = getattr(diffusers, f"{kind}Scheduler").from_config(config)
    process, _, steps, _ = scheduler.read(config, "scheduler_config.json")
    for count in (2, 3, 7, 18, 20, 43):
        theirs.set_timesteps(count)
        levels = steps.timetable(process, count)[:count]
        each = 2 if kind in ("HeunDiscrete", "KDPM2Discrete") else 1
        times, sigmas = theirs.timesteps[::each], theirs.sigmas[: each * count : each]
        torch.testing.assert_close(torch.tensor([x.t for x in levels]), times.float())
        ratios = torch.tensor([level.ratio for level in levels])
        torch.testing.assert_close(ratios, sigmas, rtol=3e-5, atol=0)


@pytest.mark.parametrize("kind", ["LCM", "TCD"])
def test_the_times_of_distilled_models_are_diffusers_own(kind: str) -> None:
    config = BASE | {"_class_name": f"{kind}Scheduler", "beta_schedule": "scaled_linear"}
    theirs = getattr(diffusers, f"{kind}Scheduler").from_config(config)
    process, _, steps, solver = scheduler.read(config, "scheduler_config.json")
    assert solver == kind.lower()
    for count in (1, 2, 4, 7, 8, 50):
        theirs.set_timesteps(count)
        ours = [level.t for level in steps.timetable(process, count)[:-1]]
        assert ours == theirs.timesteps.tolist()
    with pytest.raises(UserError, match="at most 50 steps, not 51"):
        steps.timetable(process, 51)


STEPS = [
    Steps("trailing"),
    Steps("leading", 3, to_clean=False),
    Steps("leading", 1, family="multistep"),
    Steps("linspace", family="sigma"),
    Steps("karras", family="sigma"),
    Steps("exponential", to_clean=False, family="multistep"),
    Steps("leading", teacher_steps=40),
]


VP = processes.create("vp-scaled-linear")
# The flow's config has no spacing: it is "trailing".
PAIRS = [
    *((VP, steps) for steps in STEPS),
    (processes.create("vp-linear-zsnr"), STEPS[0]),
    (processes.create("vp-cosine"), STEPS[1]),
    (processes.create("edm"), STEPS[4]),
    (Flow(t_max=1000.0), STEPS[0]),
]


@pytest.mark.parametrize("name", solvers.names())
def test_every_solver_comes_back_from_its_config(name: str) -> None:
    """With every process and reading of times; and diffusers' own class of it takes every key."""
    for process, steps in PAIRS:
        kind = "flow" if isinstance(process, Flow) else "v"
        config = scheduler.write(process, kind, steps, name)
        again, prediction, steps_again, solver = scheduler.read(config, "scheduler_config.json")
        assert (type(again), prediction, solver) == (type(process), kind, name)
        times, times_again = (s.timetable(process, 7) for s in (steps, steps_again))
        assert times_again == times
        if "latentdiff_process" not in config:
            given = {key: v for key, v in config.items() if not key.startswith("latentdiff_")}
            theirs = getattr(diffusers, str(given.pop("_class_name")))
            made, unused = theirs.from_config(given, return_unused_kwargs=True)
            assert set(unused) <= {"sigma_min", "sigma_max"}
            assert {key: made.config[key] for key in given} == given


def test_diffusers_class_is_named_where_there_is_one() -> None:
    """The usual model: nothing of our own in the config of nearly every solver of diffusers'."""
    told: dict[tuple[str, ...], set[str]] = {}
    for name in solvers.names():
        config = scheduler.write(VP, "v", Steps(), name)
        told.setdefault(tuple(k for k in config if k.startswith("latentdiff_")), set()).add(name)
    theirs = {name for name in solvers.names() if any(classes_of(name, {}))}
    # DEIS and TCD end before clean data, UniPC of order 3 lowers it at the end, LCM and TCD have
    # times of their own, DPMSolverSinglestep has its middles at them, SASolver noise at some.
    steps = {"deis", "deis-2", "unipc-3", "lcm", "tcd", "dpmpp-2s", "sa-solver"}
    assert told[("latentdiff_steps",)] == steps
    # That of dpmpp-sde needs another package, that of consistency is of flow.
    assert told[()] == theirs - steps - {"dpmpp-sde", "consistency"}


FLOWING = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
FOREIGN: list[dict[str, Any]] = [
    {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "sigma_min": 0.05},
    {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1},
    {"_class_name": "HeunDiscreteScheduler", "use_beta_sigmas": True, "sigma_max": 9.0},
    {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun", "use_lu_lambdas": True},
    {"_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min"},
    {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1},
    {"_class_name": "DPMSolverMultistepScheduler", **FLOWING},
    {"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0, 1], "solver_order": 3},
    {"_class_name": "UniPCMultistepScheduler", **FLOWING},
    {"_class_name": "DEISMultistepScheduler", "use_exponential_sigmas": True},
    {"_class_name": "DPMSolverSinglestepScheduler"},
    {"_class_name": "SASolverScheduler", "timestep_spacing": "trailing"},
    {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"},
    {"_class_name": "LCMScheduler", "timestep_scaling": 7.0, "original_inference_steps": 40},
    {"_class_name": "TCDScheduler"},
    {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_karras_sigmas": True},
    {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0},
]


@pytest.mark.parametrize("config", FOREIGN, ids=lambda config: str(config["_class_name"]))
def test_a_foreign_config_is_written_as_it_was(config: dict[str, Any]) -> None:
    """As after a fine-tune of a foreign folder: the same class, keys and runs."""
    described = scheduler.read(config, "scheduler_config.json")
    process, prediction, steps, solver = described
    written = scheduler.write(*described)
    assert not [key for key in written if key.startswith("latentdiff_")]
    assert written["_class_name"] == config["_class_name"]
    assert {key: written[key] for key in config} == {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.items()
    }
    again = scheduler.read(json.loads(json.dumps(written)), "scheduler_config.json")
    assert again[1] == prediction
    for count in (4, 20):
        (made, levels), (same, there) = (
            s.plan(solver, where, count) for s, where in ((steps, process), (again[2], again[0]))
        )
        assert there == levels
        settings = vars(made).keys() - {"process"}
        assert {key: getattr(made, key) for key in settings} == {
            key: getattr(same, key) for key in settings
        }


@pytest.mark.parametrize("name", processes.names())
def test_every_process_comes_back_from_its_config(name: str) -> None:
    process = processes.create(name)
    for steps in (Steps("trailing", 1), Steps("karras", 1), Steps("leading", 1, to_clean=False)):
        config = scheduler.write(process, "v", steps)
        again, prediction, steps_again, _ = scheduler.read(config, "scheduler_config.json")
        assert type(again) is type(process)
        assert prediction == "v"
        if isinstance(process, DiscreteVP):
            for t in (0.0, 500.5, 999.0):
                assert again.level(t).sigma == pytest.approx(process.level(t).sigma, rel=1e-9)
            assert steps_again.timetable(again, 9) == steps.timetable(again, 9)
        else:
            assert vars(again) == vars(process)
        assert scheduler.write(again, "v", steps) == config


def test_unusual_processes() -> None:
    config = scheduler.write(Flow(t_max=1000.0), "flow", Steps())
    process, prediction, _, _ = scheduler.read(config, "scheduler_config.json")
    assert isinstance(process, Flow)
    assert (process.t_max, prediction) == (1000.0, "flow")

    betas = beta_schedule("sigmoid", 50, 0.001, 0.4)
    again, _, _, _ = scheduler.read(scheduler.write(DiscreteVP(betas), "eps", Steps()), "s.json")
    assert isinstance(again, DiscreteVP)
    assert np.abs(again.betas - betas).max() < 1e-15

    with pytest.raises(UserError, match="settings of its own"):
        scheduler.write(processes.VE(sigma_max=7.0), "eps", Steps())


def test_a_key_of_no_class_is_warned_of() -> None:
    """Of a later diffusers perhaps, which also saves the defaults of all its keys."""
    config = BASE | {"_class_name": "DDIMScheduler", "_diffusers_version": "9.0"}
    config |= {"skip_prk_steps": True, "sigma_min": 0.1}  # of other classes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = scheduler.read(config | {"use_foo_sigmas": False}, "s.json")
    with pytest.warns(
        UserWarning, match=r"^s\.json: no scheduler class here knows 'use_foo_sigmas'"
    ):
        told = scheduler.read(config | {"use_foo_sigmas": True}, "s.json")
    assert told[1:] == plain[1:]
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        scheduler.to_object(told)


def _nested(depth: int) -> list[Any]:
    """A list in a list in a list, as deep as JSON is read by Python."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "vibes"},
        {"beta_schedule": "zigzag"},
        {"beta_start": "low"},
        {"beta_end": 3.0},
        {"num_train_timesteps": -5},
        {"num_train_timesteps": True},
        {"trained_betas": [[0.1], [0.2, 0.3]]},
        {"trained_betas": [0.1, "x"]},
        {"timestep_spacing": "sideways"},
        {"_class_name": "DDPMScheduler", "variance_type": "learned"},
        {"_class_name": None},
        {"latentdiff_steps": {"spacing": "sideways"}},
        {"latentdiff_steps": {"shift": True}},
        {"latentdiff_steps": {"shift": -1.0}},
        {"latentdiff_steps": {"settings": [["tau", 1.0]]}},
        {"latentdiff_steps": {"settings": ["tau"]}},
        {"latentdiff_steps": [1]},
        {"lambda_min_clipped": "low", "_class_name": "DPMSolverMultistepScheduler"},
        {"_class_name": "LatentDiffusionProcess", "latentdiff_process": "vp-liner"},
        {"latentdiff_solver": "dpm"},
        {"_class_name": "EDMEulerScheduler"},
        {"num_train_timesteps": 1000.5},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10**400},
        {"steps_offset": -1},
        {"steps_offset": 1.5},
        {"set_alpha_to_one": "no"},
        {"trained_betas": _nested(900)},
        {"prediction_type": _nested(900)},
        {"clip_sample": _nested(900)},
        {"": 1},
        {"_use_default_values": "clip_sample"},
        {"_use_default_values": [["clip_sample"], {}]},
        {"_class_name": "LCMScheduler", "original_inference_steps": 5000},
        {"_class_name": "LCMScheduler", "original_inference_steps": 0},
        {"_class_name": "LCMScheduler", "original_inference_steps": 40.5},
        {"_class_name": "LCMScheduler", "num_train_timesteps": 40},
        {"latentdiff_steps": {"teacher_steps": 0}},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -10},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 0},
        {"_class_name": "FlowMatchHeunDiscreteScheduler", "num_train_timesteps": -3},
        {"lambda_min_clipped": 5, "_class_name": "DPMSolverMultistepScheduler"},
        {"lambda_min_clipped": True, "_class_name": "DPMSolverMultistepScheduler"},
        {"use_karras_sigmas": "no", "_class_name": "DPMSolverMultistepScheduler"},
        {"disable_corrector": [0.5], "_class_name": "UniPCMultistepScheduler"},
    ],
    ids=lambda change: str(change)[:80],
)
def test_nonsense_is_one_clear_line(change: dict[str, Any]) -> None:
    usual = BASE | {"_class_name": "DDIMScheduler", "clip_sample": False}
    scheduler.read(usual, "scheduler_config.json", pipeline="")
    with pytest.raises(UserError, match=r"^scheduler_config\.json: ") as caught:
        scheduler.read(usual | change, "scheduler_config.json", pipeline="")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_clipped_schedule_has_fewer_times() -> None:
    """`lambda_min_clipped` of DPMSolverMultistepScheduler: none before that half log-SNR."""
    usual = BASE | {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": 3.0}
    for spacing in ("linspace", "leading", "trailing"):
        process, _, steps, _ = scheduler.read(usual | {"timestep_spacing": spacing}, "s.json")
        assert steps.timetable(process, 1)[0].t < 3
        if spacing != "trailing":  # that keeps its stride, and so has fewer steps
            with pytest.raises(UserError, match="2 times, too few for 20 steps"):
                steps.timetable(process, 20)
    assert len(steps.timetable(process, 20)) == 2


def test_whole_numbers_may_be_written_as_floats() -> None:
    plain = BASE | {"_class_name": "LCMScheduler"}
    floats = plain | {"num_train_timesteps": 1000.0, "original_inference_steps": 50.0}
    one, other = (scheduler.read(config, "s.json")[2] for config in (plain, floats))
    assert one == other
    assert type(other.teacher_steps) is int


@pytest.mark.parametrize("kind", processes.names())
def test_a_new_model_says_its_timetable_in_keys_of_diffusers_alone(kind: str) -> None:
    """Karras where diffusers' class of it draws sound pictures: from sigma / alpha = 80 at most."""
    process = processes.create(kind)
    steps = usual_steps(process)
    low = isinstance(process, DiscreteVP) and process.level(process.t_max).ratio < 80
    assert (steps.spacing == "karras") == low
    config = scheduler.write(process, "v", steps)
    assert scheduler.read(config, "")[2].meaning(process) == steps.meaning(process)
    assert config.get("use_karras_sigmas", False) == low
    if low:
        assert not any(key.startswith("latentdiff_") for key in config)

"""A saved scheduler config draws diffusers' picture here, to 1e-4 in pixels, or is refused by name.

Each class with each spacing, ramp of sigmas, end and prediction; configs that `from_config` carried
from class to class; flow; keys of the solvers; and every key of every class changed. The whole
product takes about ten minutes (`-m slow`); by default a part of it runs, another one every day.
"""

import itertools
import json
from collections.abc import Iterator
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.saved_schedulers import (
    SD,
    THEIRS,
    Keys,
    agrees,
    draw,
    quiet,
    read,
    refusal,
    save,
    theirs,
)

from latentdiff import LatentDiffusionPipeline
from latentdiff.errors import UserError
from latentdiff.formats.scheduler_classes import CLASSES, RANGE, known_keys
from latentdiff.pipeline.arguments import run_of

# DPMSolverSDE needs another package; its noise is not that of a generator.
NAMES = [name for name in CLASSES if name != "DPMSolverSDEScheduler" and "Parallel" not in name]
FLOW = [name for name in NAMES if CLASSES[name].family == "flow"]
RAMPS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
STEPS = (5, 8, 16)
Mutation = tuple[dict[str, object], dict[str, object], str]
"""A config, the same with one key changed, and the key."""


def today(everything: list[Any], share: int) -> list[Any]:
    """Every `share`-th, from another one each day on."""
    return everything[date.today().toordinal() % share :: share]


def product(name: str) -> Iterator[tuple[dict[str, object], int]]:
    """Configs of a class, and numbers of steps."""
    defaults = CLASSES[name].defaults
    ramps = [{}, *({key: True} for key in RAMPS if key in defaults)]
    spacings: list[dict[str, object]] = [{}]
    if "timestep_spacing" in defaults:
        spacings = [{"timestep_spacing": s} for s in ("leading", "trailing", "linspace")]
    ends: list[dict[str, object]] = [{}]
    if "final_sigmas_type" in defaults:
        ends = [{"final_sigmas_type": end} for end in ("zero", "sigma_min")]
    elif "set_alpha_to_one" in defaults:
        ends = [{"set_alpha_to_one": to_clean} for to_clean in (True, False)]
    fixed = {"_class_name": name, **SD}
    fixed |= {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    kinds = PREDICTIONS if name not in FLOW else ("flow_prediction",)
    for spacing, ramp, end, kind, steps in itertools.product(spacings, ramps, ends, kinds, STEPS):
        yield {**fixed, **spacing, **ramp, **end, "prediction_type": kind}, steps


def check(cases: list[tuple[dict[str, object], int]], folder: Path) -> int:
    """How many of them were compared; all that were have the same pixels."""
    compared = 0
    for config, steps in cases:
        try:
            same = agrees(config, steps, folder)
        except UserError:
            continue
        assert same is not False, (config, steps)
        compared += same is True
    return compared


@pytest.mark.parametrize("name", NAMES)
def test_every_combination_of_a_class(name: str, tmp_path: Path) -> None:
    check(today(list(product(name)), 192), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_product_of_a_class(name: str, tmp_path: Path) -> None:
    cases = list(product(name))
    share = 6 if name == "PNDMScheduler" else 4  # which takes neither x0, nor most spacings rightly
    assert check(cases, tmp_path) >= len(cases) / share


SD_1_5: dict[str, object] = {
    **SD,
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
CHAINS = [
    ("PNDM", "DPMSolverMultistep", "UniPCMultistep"),
    ("PNDM", "UniPCMultistep", "DPMSolverMultistep"),
    ("PNDM", "DPMSolverMultistep", "DEISMultistep", "DPMSolverSinglestep"),
    ("PNDM", "EulerDiscrete", "HeunDiscrete", "DDIM"),
    ("PNDM", "LCM", "TCD", "EulerAncestralDiscrete"),
    ("PNDM", "DDIM", "DDPM", "KDPM2Discrete", "LMSDiscrete"),
]


def carried(names: tuple[str, ...], folder: Path, **keys: object) -> Path:
    """The folder of a pipeline whose scheduler was exchanged, by `from_config`, class by class."""
    scheduler: Any = THEIRS.PNDMScheduler.from_config(SD_1_5)
    with quiet():
        for short in names:
            scheduler = getattr(THEIRS, f"{short}Scheduler").from_config(scheduler.config, **keys)
    scheduler.save_pretrained(folder / "scheduler")
    written = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return save(written, folder)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FLOW])
def test_the_config_of_stable_diffusion_carried_into_each_class(name: str, tmp_path: Path) -> None:
    """`set_alpha_to_one` false in it is heard by two of them alone."""
    folder = carried((name.removesuffix("Scheduler"),), tmp_path)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["set_alpha_to_one"] is False
    assert config["skip_prk_steps"] is True
    assert agrees(config, 5, tmp_path)


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_configs_carried_from_class_to_class(chain: tuple[str, ...], tmp_path: Path) -> None:
    folder = carried(chain, tmp_path)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert agrees(config, 5, tmp_path)


def with_keys(short: str, steps: int, **keys: object) -> tuple[dict[str, object], int]:
    return {**SD, "_class_name": f"{short}Scheduler", **keys}, steps


FLOWING: dict[str, object] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SPECIAL = [
    *(
        with_keys(short, 5, **FLOWING, flow_shift=shift)
        for short in ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep")
        for shift in (1.0, 3.0)
    ),
    with_keys("DPMSolverSinglestep", 6, **FLOWING, flow_shift=3.0),
    *(
        ({"_class_name": f"FlowMatch{short}Scheduler", "shift": 3.0, **keys}, 5)
        for short, keys in (
            ("EulerDiscrete", {}),
            ("EulerDiscrete", {"use_karras_sigmas": True}),
            ("EulerDiscrete", {"use_beta_sigmas": True}),
            ("EulerDiscrete", {"stochastic_sampling": True}),
            ("HeunDiscrete", {}),
            ("LCM", {"use_exponential_sigmas": True}),
        )
    ),
    with_keys("DPMSolverMultistep", 5, **COSINE, lambda_min_clipped=-5.1),
    # With more steps their first two times are the same, at which they stumble.
    with_keys("DPMSolverMultistep", 3, **COSINE, use_karras_sigmas=True),
    with_keys("DPMSolverSinglestep", 5, **COSINE, lambda_min_clipped=-5.1),
    with_keys("DPMSolverMultistep", 5, solver_type="heun"),
    with_keys("DPMSolverMultistep", 5, solver_type="heun", algorithm_type="sde-dpmsolver++"),
    with_keys("DPMSolverMultistep", 5, algorithm_type="sde-dpmsolver++"),
    with_keys("DPMSolverMultistep", 5, algorithm_type="sde-dpmsolver++", solver_order=1),
    with_keys("DPMSolverMultistep", 5, final_sigmas_type="sigma_min", lower_order_final=False),
    with_keys("DPMSolverMultistep", 16, final_sigmas_type="sigma_min"),
    with_keys("DPMSolverMultistep", 16, final_sigmas_type="sigma_min", euler_at_final=True),
    with_keys("DPMSolverMultistep", 5, use_lu_lambdas=True),
    with_keys("DPMSolverSinglestep", 6, final_sigmas_type="sigma_min"),
    with_keys("DPMSolverSinglestep", 6, final_sigmas_type="sigma_min", lower_order_final=True),
    with_keys("DPMSolverSinglestep", 4, solver_order=1),
    with_keys("UniPCMultistep", 6, disable_corrector=[0, 1]),
    with_keys("UniPCMultistep", 6, solver_order=3),
    with_keys("UniPCMultistep", 6, solver_order=1),
    with_keys("UniPCMultistep", 6, solver_order=3, final_sigmas_type="sigma_min"),
    with_keys("UniPCMultistep", 6, lower_order_final=False, final_sigmas_type="sigma_min"),
    with_keys("DEISMultistep", 6, solver_order=3),
    with_keys("DEISMultistep", 16, solver_order=3),
    with_keys("DEISMultistep", 16, solver_order=3, use_karras_sigmas=True),
    with_keys("DEISMultistep", 6, solver_order=3, lower_order_final=False),
    with_keys("EulerDiscrete", 5, use_karras_sigmas=True, sigma_min=0.1, sigma_max=9.0),
    with_keys("HeunDiscrete", 4, use_exponential_sigmas=True, sigma_max=9.0),
    with_keys("LMSDiscrete", 5, use_karras_sigmas=True, sigma_max=9.0),  # hears nothing
    with_keys("KDPM2Discrete", 4, use_beta_sigmas=True, sigma_min=0.1, timestep_spacing="leading"),
    with_keys("PNDM", 5, skip_prk_steps=False),
    with_keys("LCM", 4, original_inference_steps=40, timestep_scaling=0.01),
    with_keys("TCD", 3, original_inference_steps=40),
    *(with_keys(short, 5, **ZERO_SNR) for short in ("DDIM", "DDPM", "LCM", "UniPCMultistep")),
    *(with_keys(short, 5, **ZERO_SNR) for short in ("EulerDiscrete", "DPMSolverMultistep")),
]


@pytest.mark.parametrize(("config", "steps"), SPECIAL, ids=str)
def test_keys_of_solvers_and_of_flow(config: dict[str, object], steps: int, tmp_path: Path) -> None:
    assert agrees(config, steps, tmp_path)


def test_the_first_config_of_stable_diffusion(tmp_path: Path) -> None:
    """Version 1.4's, of diffusers 0.2.2: what it leaves out is false for PNDM, and 1."""
    config = {**SD, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
    assert not read(save(config, tmp_path)).steps.to_clean
    assert agrees(config, 5, tmp_path)


def test_the_own_end_is_that_of_the_own_solver(tmp_path: Path) -> None:
    """A solver that draws noise would leave that of the first time in the picture."""
    model = read(save(SD_1_5, tmp_path))
    clean = model.process.data_level()
    assert model.plan(8)[1][-1] == model.process.level(0.0)
    assert model.timetable(None, 8) == (*model.plan(8)[1][:-1], clean)
    own, named = draw(model, 8), draw(model, 8, solver="plms")
    assert np.array_equal(own, named)
    ancestral = carried(("EulerAncestralDiscrete",), tmp_path / "a", timestep_spacing="leading")
    other = theirs(ancestral, 8)
    assert np.abs(draw(model, 8, solver="euler-a") - other).max() <= 1e-4


def test_another_solver_takes_the_levels_of_the_folder(tmp_path: Path) -> None:
    """Whatever spacing diffusers' class of it would have; `from_config` is what asks for that."""
    for number, config in enumerate((SD_1_5, SD_1_5 | {"timestep_spacing": "trailing"})):
        model = read(save(config, tmp_path / f"{number}"))
        levels = (*model.plan(8)[1][:-1], model.process.data_level())
        for name in ("euler", "heun", "dpmpp-2m", "unipc", "lcm", "ddpm"):
            assert run_of(name, None, model, 8)[1] == levels, name
        assert run_of("euler", "karras", model, 8)[1] != levels


@pytest.mark.parametrize("spacing", [{}, {"timestep_spacing": "leading"}], ids=str)
@pytest.mark.parametrize("short", ["EulerDiscrete", "DPMSolverMultistep", "DDIM", "UniPCMultistep"])
def test_the_line_that_exchanges_a_scheduler_does_what_it_does_in_diffusers(
    short: str, spacing: dict[str, Any], tmp_path: Path
) -> None:
    """Keys that the folder leaves out get the new class's default, those that it has stay."""
    folder, kind = save(SD_1_5 | spacing, tmp_path), getattr(THEIRS, f"{short}Scheduler")
    pipe = LatentDiffusionPipeline(read(folder))
    with quiet():
        old = THEIRS.PNDMScheduler.from_pretrained(folder, subfolder="scheduler")
        new = kind.from_config(old.config)
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    for key in CLASSES[kind.__name__].defaults.keys() & new.config.keys():
        assert pipe.scheduler.config[key] == new.config[key], key
    new.set_timesteps(5)
    assert [level.t for level in pipe.bundle.plan(5)[1][:5]] == new.timesteps.tolist()[:5]


def test_two_classes_in_one_folder_are_warned_of(tmp_path: Path) -> None:
    """As after `scheduler.save_pretrained(folder / "scheduler")`: it is meant, but not loaded."""
    save(SD_1_5 | {"_class_name": "EulerDiscreteScheduler"}, tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("EulerDiscrete", "DDIM"))
    with pytest.warns(UserWarning, match="of EulerDiscreteScheduler, which is taken; diffusers t"):
        assert read(tmp_path).solver == "euler"


@pytest.mark.parametrize("short", ["EulerAncestralDiscrete", "UniPCMultistep", "LCM"])
def test_a_scheduler_object_is_obeyed_as_diffusers_obeys_it(short: str, tmp_path: Path) -> None:
    """The commonest line of diffusers' users, with our pipeline."""
    pipe = LatentDiffusionPipeline(read(save(SD_1_5, tmp_path)))
    kind = getattr(THEIRS, f"{short}Scheduler")
    before = pipe.bundle
    with quiet():
        pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="leading")
    assert type(pipe.scheduler) is kind
    assert pipe.bundle.network is before.network
    other = theirs(carried((short,), tmp_path, timestep_spacing="leading"), 5)
    assert np.abs(draw(pipe.bundle, 5) - other).max() <= 1e-4
    with pytest.raises(UserError, match=r"^scheduler: DDIMScheduler with thresholding=True does"):
        pipe.scheduler = THEIRS.DDIMScheduler(clip_sample=False, thresholding=True)
    with pytest.raises(UserError, match="give a scheduler object of diffusers, not str"):
        pipe.scheduler = "euler"
    assert pipe.bundle.solver == {"Eul": "euler-a", "Uni": "unipc", "LCM": "lcm"}[short[:3]]


# A value or two of each key that is not a class's default.
VALUES: dict[str, tuple[object, ...]] = {
    "num_train_timesteps": (500,),
    "beta_start": (0.002,),
    "beta_end": (0.02,),
    "beta_schedule": ("linear", "squaredcos_cap_v2"),
    "trained_betas": (np.linspace(0.001, 0.02, 1000).tolist(),),
    "prediction_type": ("epsilon", "sample", "flow_prediction"),
    "timestep_spacing": ("linspace", "trailing"),
    "steps_offset": (0, 3),
    "rescale_betas_zero_snr": (True,),
    "set_alpha_to_one": (True, False),
    "clip_sample": (True,),
    "clip_sample_range": (0.3,),
    "thresholding": (True,),
    "dynamic_thresholding_ratio": (0.9,),
    "sample_max_value": (2.0,),
    "variance_type": (
        "fixed_large",
        "fixed_small_log",
        "fixed_large_log",
        "learned",
        "learned_range",
    ),
    "skip_prk_steps": (True, False),
    "interpolation_type": ("log_linear",),
    "timestep_type": ("continuous",),
    **dict.fromkeys(RAMPS, (True,)),
    "sigma_min": (0.1,),
    "sigma_max": (8.0, 0.9),
    "final_sigmas_type": ("sigma_min",),
    "solver_order": (1, 3),
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++", "deis", "noise_prediction"),
    "solver_type": ("heun", "midpoint", "bh1", "bh2", "logrho"),
    "lower_order_final": (True, False),
    "euler_at_final": (True,),
    "lambda_min_clipped": (-2.0,),
    "use_flow_sigmas": (True,),
    "flow_shift": (3.0,),
    "use_dynamic_shifting": (True,),
    "time_shift_type": ("linear",),
    "shift_terminal": (0.1,),
    "predict_x0": (False,),
    "disable_corrector": ([0], [0, 1]),
    "solver_p": ("euler",),
    "predictor_order": (1, 3),
    "corrector_order": (1, 3),
    "tau_func": ("one",),
    "original_inference_steps": (40,),
    "timestep_scaling": (0.01,),
    "noise_sampler_seed": (3,),
    "shift": (3.0,),
    "base_shift": (0.7,),
    "max_shift": (2.0,),
    "base_image_seq_len": (100,),
    "max_image_seq_len": (5000,),
    "invert_sigmas": (True,),
    "stochastic_sampling": (True,),
    "scale_factors": ([2.0],),
    "upscale_mode": ("nearest",),
}


def bases(name: str) -> list[dict[str, object]]:
    """Configs to change: the usual one, and one with a ramp, which the ends of ramps belong to."""
    if name in FLOW:
        usual: dict[str, object] = {"_class_name": name, "num_train_timesteps": 1000, "shift": 2.0}
    else:
        kind = "epsilon" if name == "PNDMScheduler" else "v_prediction"
        usual = {"_class_name": name, **SD, "prediction_type": kind, "clip_sample": False}
        usual |= {"timestep_spacing": "leading", "steps_offset": 1, "skip_prk_steps": True}
    ramped = bool(CLASSES[name].ranged)
    return [usual, usual | {"use_exponential_sigmas": True}] if ramped else [usual]


def mutations(name: str) -> Iterator[Mutation]:
    """Each key left out, at its default, at others, and of other classes."""
    defaults = CLASSES[name].defaults
    usual, *ramped = bases(name)
    for key in sorted(known_keys()):
        if key in usual:
            yield usual, {k: v for k, v in usual.items() if k != key}, key
        if key in defaults:
            default = defaults[key]
            default = list(default) if isinstance(default, tuple) else default
            yield usual, usual | {key: default}, key
        for value in VALUES[key]:
            yield usual, usual | {key: value}, key
            for base in ramped if key in (*RANGE, "timestep_spacing", *RAMPS) else ():
                yield base, base | {key: value}, key


def judge(base: Keys, changed: Keys, key: str, folder: Path) -> str:
    """What became of a mutation; "refused", "same" for nothing in both, "followed", "excused".

    A key without effect, of its class or of another, must leave both pictures as they are.
    """
    kind, steps = CLASSES[str(base["_class_name"])], 4
    if (line := refusal(changed, folder)) is not None:
        assert key in line, (changed, line)
        return "refused"
    foreign = key not in kind.defaults and not (key in RANGE and kind.ranged)
    if key not in kind.idle and not foreign:
        same = agrees(changed, steps, folder)
        assert same is not False, (changed, key)
        return "followed" if same else "excused"
    model, plain = read(save(changed, folder)), read(save(base, folder))
    assert (model.solver, model.prediction) == (plain.solver, plain.prediction)
    assert model.plan(4)[1] == plain.plan(4)[1]
    assert model.steps.meaning(model.process) == plain.steps.meaning(plain.process)
    before = unchanged(json.dumps(base), folder)
    assert np.array_equal(before, theirs(save(changed, folder), steps)), (changed, key)
    return "same"


@cache
def unchanged(base: str, folder: Path) -> np.ndarray:
    return theirs(save(json.loads(base), folder), 4)


def test_the_values_are_of_every_key() -> None:
    assert set(VALUES) == known_keys()


# Keys that take any number of a range.
NUMBERS: dict[str, st.SearchStrategy[float]] = {
    "beta_start": st.floats(1e-4, 4e-3),
    "beta_end": st.floats(5e-3, 3e-2),
    "num_train_timesteps": st.sampled_from([400, 600, 1000]),
    "steps_offset": st.integers(0, 5),
    "sigma_min": st.floats(0.05, 0.3),
    "sigma_max": st.floats(3, 14),
    "lambda_min_clipped": st.floats(-4, -1),
    "flow_shift": st.floats(0.5, 8),
    "shift": st.floats(0.5, 8),
    "original_inference_steps": st.integers(20, 100),
    "timestep_scaling": st.floats(0.01, 20),
}


@st.composite
def mutated(draw: st.DrawFn) -> Mutation:
    """One key of a class's config left out, at its default, at another value,
    or one of another class."""
    name = draw(st.sampled_from(NAMES))
    base = draw(st.sampled_from(bases(name)))
    defaults = CLASSES[name].defaults
    foreign = sorted(known_keys() - set(defaults))
    kind = draw(st.sampled_from(["drop", "default", "value", "value", "value", "foreign"]))
    of = {"drop": sorted(set(base) & set(defaults)), "foreign": foreign}.get(kind, sorted(defaults))
    key = draw(st.sampled_from(of))
    if kind == "drop":
        return base, {k: v for k, v in base.items() if k != key}, key
    value = defaults.get(key) if kind == "default" else draw(values(key))
    return base, base | {key: list(value) if isinstance(value, tuple) else value}, key


def values(key: str) -> st.SearchStrategy[object]:
    listed = st.sampled_from(VALUES[key])
    return listed | NUMBERS[key] if key in NUMBERS else listed


@given(mutated())
@settings(max_examples=20, deadline=None)
def test_a_changed_key_is_followed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, mutation: Mutation
) -> None:
    """Whatever is done to a config moves the picture as it moves diffusers', leaves both as they
    are, or is refused in a line that names the key."""
    judge(*mutation, tmp_path_factory.mktemp("config"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_changed_key_is_followed_or_refused(name: str, tmp_path: Path) -> None:
    found = [judge(*mutation, tmp_path) for mutation in mutations(name)]
    assert found.count("excused") < len(found) / 4
    assert found.count("followed") > 10 or name in FLOW

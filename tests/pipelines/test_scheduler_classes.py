"""The table of scheduler classes is diffusers' own: every class, every key, every default."""

import ast
import contextlib
import math
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler

from latentdiff import solvers
from latentdiff.diffusion import process
from latentdiff.errors import UserError
from latentdiff.formats.scheduler_classes import CLASSES, RANGE, complete, known_keys, solver_of
from latentdiff.formats.scheduler_config import MENDED

FOLDER = Path(diffusers.__file__).parent / "schedulers"
# They have a process of their own, or one that no latent model of images has.
NOT_HERE = {"IPNDMScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}


@cache
def classes() -> dict[str, ast.ClassDef]:
    """Each class of diffusers' own source, one that cannot be imported here included."""
    return {
        node.name: node
        for path in FOLDER.glob("scheduling_*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Scheduler")
    }


def signature(node: ast.ClassDef) -> dict[str, object]:
    """Arguments and defaults of a class, all of which have one."""
    (made,) = (p for p in node.body if isinstance(p, ast.FunctionDef) and p.name == "__init__")
    names = [argument.arg for argument in made.args.args[1:]]
    return dict(zip(names, map(value_of, made.args.defaults), strict=True))


def value_of(default: ast.expr) -> object:
    if ast.unparse(default) == "-float('inf')":
        return -math.inf
    value = ast.literal_eval(default)
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("name", CLASSES)
def test_keys_and_defaults_are_those_of_the_class(name: str) -> None:
    assert dict(CLASSES[name].defaults) == signature(classes()[name])


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_with_its_own_defaults_is_read(name: str) -> None:
    """But for the clipping of x_0 that some have, and that the pipelines of latents switch off."""
    given = complete(name, {"clip_sample": False})
    solver, settings = solver_of(name, given)
    made = solvers.create(solver, process.create("vp-linear"))
    assert all(hasattr(made, setting) for setting in settings)


@pytest.mark.parametrize("name", CLASSES)
def test_the_table_speaks_of_keys_that_exist(name: str) -> None:
    kind = CLASSES[name]
    keys = set(kind.defaults)
    told = {*kind.idle, *kind.only, *kind.never, *kind.aliases}
    told |= {key for row in kind.rows for key in row.when}
    told |= {key for clash in kind.clashes for key in clash}
    assert told <= keys
    assert not kind.idle & set(kind.only)
    assert set(kind.ranged) <= {"karras", "exponential", "beta"}


def test_every_class_is_in_the_table_or_refused_by_name() -> None:
    """A class of a later diffusers, too."""
    for name in [*(set(classes()) - set(CLASSES)), "FooScheduler", "no scheduler class"]:
        with pytest.raises(UserError, match=f"models of {name[:40]}"):
            complete(name, {})
    assert not NOT_HERE & set(CLASSES)


def test_the_ends_of_ramps_are_what_any_class_asks_its_config_for() -> None:
    """`hasattr(self.config, ...)`: keys that a class reads though it has no such argument."""
    for name, kind in CLASSES.items():
        path = next(p for p in FOLDER.glob("*.py") if f"class {name}(" in p.read_text("utf-8"))
        source = path.read_text("utf-8")
        for ramp in ("karras", "exponential", "beta"):
            _, found, rest = source.partition(f"def _convert_to_{ramp}(")
            body = rest.split("\n    def ")[0]
            asks = bool(found) and all(f'hasattr(self.config, "{key}")' in body for key in RANGE)
            assert asks == (ramp in kind.ranged) or name == "SASolverScheduler"
        assert source.count("hasattr(self.config") == 2 * source.count('self.config, "sigma_min"')


def test_what_is_refused_is_named() -> None:
    for keys, message in {
        ("thresholding", True): "DDIMScheduler with thresholding=True does not work here; False",
        ("clip_sample", True): "DDIMScheduler with clip_sample=True does not work here; False does",
    }.items():
        with pytest.raises(UserError, match=message):
            complete("DDIMScheduler", {"clip_sample": False, keys[0]: keys[1]})
    both = {"use_flow_sigmas": True, "use_karras_sigmas": True}
    with pytest.raises(UserError, match="use_flow_sigmas=True and use_karras_sigmas=True does"):
        complete("DPMSolverMultistepScheduler", both)
    name = "DPMSolverMultistepScheduler"
    given = complete(name, {"solver_order": 4, "algorithm_type": "dpmsolver"})
    with pytest.raises(UserError, match="solver_order=4 and algorithm_type='dpmsolver'"):
        solver_of(name, given)


@pytest.mark.parametrize("name", MENDED)
def test_pipelines_mend_configs_as_diffusers_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What their constructors do to a scheduler, without a model."""
    pipeline: Any = getattr(diffusers, name)
    monkeypatch.setattr(pipeline, "register_modules", lambda self, **parts: None)
    parts = ("vae", "text_encoder", "tokenizer", "unet", "feature_extractor", "safety_checker")
    for kind in (DDIMScheduler, PNDMScheduler):
        scheduler: Any = kind(steps_offset=7)
        before = dict(scheduler.config)
        with contextlib.suppress(AttributeError):  # PAG looks for layers in the U-Net
            pipeline(**dict.fromkeys(parts), scheduler=scheduler, requires_safety_checker=False)
        changed = {
            key: scheduler.config[key] for key in before if scheduler.config[key] != before[key]
        }
        assert changed == {key: v for key, v in MENDED[name].items() if key in before}


def test_known_keys() -> None:
    assert {"skip_prk_steps", "sigma_max", "use_lu_lambdas"} <= known_keys()

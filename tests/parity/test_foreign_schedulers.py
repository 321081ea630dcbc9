"""diffusers' own scheduler objects through our loop, and our solvers through their configs."""

import importlib
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from schedulers import CONFIG, VP, assert_equal_trails, ours, theirs

from latentdiff import solvers
from latentdiff.diffusion import process, sampling
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian
from latentdiff.errors import UserError
from latentdiff.formats import scheduler_classes
from latentdiff.solvers.diffusers_scheduler import DiffusersScheduler


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        DPMSolverMultistepScheduler,
    ],
)
def test_a_scheduler_through_our_loop_is_itself(kind: Any, prediction: Any) -> None:
    """Every x of their own loop; twice, for the object given is left as it was."""
    settings: dict[str, Any] = {"timestep_spacing": "leading"}
    if kind is DDIMScheduler:
        settings["clip_sample"] = False
    name: Any = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    scheduler = kind(**CONFIG, **settings, prediction_type=name)
    adapter = DiffusersScheduler(scheduler, VP, 10)
    other = theirs(kind(**CONFIG, **settings, prediction_type=name), lambda s: s.set_timesteps(10))
    for _ in range(2):
        mine = ours(adapter, adapter.timetable(), prediction)
        assert_equal_trails(mine[:-1], other[:-1])


def test_a_flow_scheduler_reaches_the_data() -> None:
    data = Gaussian(torch.tensor([0.5]).double(), torch.tensor([[0.4]]).double())
    adapter = DiffusersScheduler(FlowMatchEulerDiscreteScheduler(), process.Flow(1000.0), 200)
    levels = adapter.timetable()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    end = sampling.sample(data, adapter, levels, x, noise=NoiseStreams(0))
    assert (end - data.flow(x, levels[0], levels[-1])).abs().max() < 0.02


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(UserError, match="PNDMScheduler cannot"):
        DiffusersScheduler(PNDMScheduler(), VP, 10)
    with pytest.raises(UserError, match="object cannot"):
        DiffusersScheduler(object(), VP, 10)


FILES = {
    "EulerDiscreteScheduler": "euler_discrete",
    "DPMSolverMultistepScheduler": "dpmsolver_multistep",
    "DPMSolverSinglestepScheduler": "dpmsolver_singlestep",
    "UniPCMultistepScheduler": "unipc_multistep",
    "DEISMultistepScheduler": "deis_multistep",
    "PNDMScheduler": "pndm",
    "LCMScheduler": "lcm",
}


@pytest.mark.parametrize("name", solvers.names())
def test_configs_make_the_round_trip(name: str) -> None:
    """Our plan becomes diffusers' keys and comes back, also through its own object."""
    try:
        keys = scheduler_classes.write(name)
    except UserError:
        return
    assert scheduler_classes.read(keys) == name
    if (kind := str(keys["_class_name"])) in FILES:
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{FILES[kind]}")
        scheduler = getattr(module, kind).from_config(keys)
        assert scheduler_classes.read({**scheduler.config, "_class_name": kind}) == name


def test_configs_of_others() -> None:
    assert (
        scheduler_classes.read({"_class_name": "PNDMScheduler", "skip_prk_steps": 1 == 1}) == "plms"
    )
    assert (
        scheduler_classes.read({"_class_name": "EulerDiscreteScheduler", "steps_offset": 1})
        == "euler"
    )
    assert scheduler_classes.read({"_class_name": "VQDiffusionScheduler"}) is None
    with pytest.raises(UserError, match="no scheduler for the solver 'rk45'"):
        scheduler_classes.write("rk45")

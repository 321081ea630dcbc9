"""diffusers' own scheduler objects through our loop, and our solvers through their configs."""

from typing import Any

import diffusers
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
from latentdiff.formats.scheduler_classes import classes_of, complete, solver_of
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


@pytest.mark.parametrize("name", solvers.names())
def test_configs_make_the_round_trip(name: str) -> None:
    """Where diffusers has the method: to its keys and back, also through its own object."""
    for kind, keys in classes_of(name, {}):
        given = complete(kind, {"clip_sample": False, **keys})
        assert solver_of(kind, given)[0] == name
        if kind != "DPMSolverSDEScheduler":  # needs another package
            scheduler = getattr(diffusers, kind).from_config(keys, clip_sample=False)
            assert solver_of(kind, complete(kind, scheduler.config))[0] == name


def test_configs_of_others() -> None:
    def solver(kind: str, **keys: object) -> str:
        return solver_of(kind, complete(kind, keys))[0]

    assert solver("PNDMScheduler", skip_prk_steps=True) == "plms"
    assert solver("EulerDiscreteScheduler", steps_offset=1) == "euler"
    assert solver("FlowMatchEulerDiscreteScheduler", stochastic_sampling=True) == "consistency"
    with pytest.raises(UserError, match="models of VQDiffusionScheduler are not"):
        solver("VQDiffusionScheduler")
    assert not list(classes_of("rk45", {}))

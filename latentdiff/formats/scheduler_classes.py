"""Our solvers in diffusers' `scheduler_config.json`: which of their classes means which of ours."""

from collections.abc import Mapping

from latentdiff.errors import UserError

# Their solvers on the noise refuse to go to clean data.
_NOISE_FORM = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}

# Our name, their class, and the keys that tell methods of one class apart. Of several rows for one
# name, the first of its kind of model (flow or not) is written.
_EQUIVALENTS: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("ddpm", "DDPM", {"variance_type": "fixed_small"}),
    ("ddpm", "DDPM", {"variance_type": "learned_range"}),
    ("ddim", "DDIM", {}),
    ("euler", "EulerDiscrete", {}),
    ("euler", "FlowMatchEulerDiscrete", {}),
    ("euler-a", "EulerAncestralDiscrete", {}),
    ("heun", "HeunDiscrete", {}),
    ("heun", "FlowMatchHeunDiscrete", {}),
    ("dpm2", "KDPM2Discrete", {}),
    ("dpm2-a", "KDPM2AncestralDiscrete", {}),
    ("lms", "LMSDiscrete", {}),
    ("plms", "PNDM", {"skip_prk_steps": True}),
    ("pndm", "PNDM", {"skip_prk_steps": False}),
    ("ipndm", "IPNDM", {}),
    ("deis-2", "DEISMultistep", {"solver_order": 2}),
    ("deis", "DEISMultistep", {"solver_order": 3}),
    ("dpm-solver-1", "DPMSolverMultistep", {"solver_order": 1, "algorithm_type": "dpmsolver++"}),
    ("dpmpp-2m", "DPMSolverMultistep", {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    ("dpmpp-3m", "DPMSolverMultistep", {"solver_order": 3, "algorithm_type": "dpmsolver++"}),
    (
        "dpmpp-2m-sde",
        "DPMSolverMultistep",
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
    ),
    (
        "dpmpp-3m-sde",
        "DPMSolverMultistep",
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
    ),
    ("dpmpp-2s", "DPMSolverSinglestep", {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    ("dpm-solver-2", "DPMSolverSinglestep", {"solver_order": 2, **_NOISE_FORM}),
    ("dpm-solver-3", "DPMSolverSinglestep", {"solver_order": 3, **_NOISE_FORM}),
    ("dpmpp-sde", "DPMSolverSDE", {}),
    ("unipc", "UniPCMultistep", {"solver_order": 2, "solver_type": "bh2"}),
    ("unipc-bh1", "UniPCMultistep", {"solver_order": 2, "solver_type": "bh1"}),
    ("unipc-3", "UniPCMultistep", {"solver_order": 3, "solver_type": "bh2"}),
    ("sa-solver", "SASolver", {}),
    ("lcm", "LCM", {}),
    ("consistency", "FlowMatchLCM", {}),
    ("tcd", "TCD", {}),
)
_DEFAULTS: dict[str, object] = {
    "variance_type": "fixed_small",
    "skip_prk_steps": False,
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "bh2",
    "final_sigmas_type": "zero",
}


def read(config: Mapping[str, object]) -> str | None:
    """The name of our solver for a `scheduler_config.json`; None where there is none.

    A key that is left out has its class's default.
    """
    for name, theirs, keys in _EQUIVALENTS:
        given = {key: config.get(key, _DEFAULTS[key]) for key in keys}
        if config.get("_class_name") == f"{theirs}Scheduler" and given == keys:
            return name
    return None


def write(name: str, *, flow: bool = False) -> dict[str, object]:
    """The keys of a `scheduler_config.json` that mean this solver; process and times have theirs.

    Args:
        name: the name of one of our solvers.
        flow: for a model of rectified flow.

    Raises:
        UserError: diffusers has no scheduler for it.
    """
    for ours, theirs, keys in _EQUIVALENTS:
        if ours == name and theirs.startswith("FlowMatch") == flow:
            return {"_class_name": f"{theirs}Scheduler", **keys}
    raise UserError(f"diffusers has no scheduler for the solver '{name}'.")

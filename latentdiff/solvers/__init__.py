"""Solvers by name; one file per family.

To name them needs no torch: a family is imported when a solver of it is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError
from latentdiff.registry import check_name

if TYPE_CHECKING:
    from latentdiff.diffusion.process import Process
    from latentdiff.diffusion.solver import Solver
    from latentdiff.solvers.adams import DEIS
    from latentdiff.solvers.ancestral import DDIM, DDPM
    from latentdiff.solvers.churn import Churn
    from latentdiff.solvers.consistency import LCM, TCD, Consistency
    from latentdiff.solvers.dpm import DPM2, DPMSolver3
    from latentdiff.solvers.dpmpp import DPMpp2M, DPMpp2S, DPMpp3M
    from latentdiff.solvers.edm import Euler, Heun
    from latentdiff.solvers.gddim import GDDIM
    from latentdiff.solvers.langevin import AnnealedLangevin, PredictorCorrector, RecoveryLangevin
    from latentdiff.solvers.pndm import IPNDM, PLMS, PNDM
    from latentdiff.solvers.sde import EulerMaruyama, SASolver
    from latentdiff.solvers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "DPM2",
    "GDDIM",
    "IPNDM",
    "LCM",
    "PLMS",
    "PNDM",
    "TCD",
    "AnnealedLangevin",
    "Churn",
    "Consistency",
    "DPMSolver3",
    "DPMpp2M",
    "DPMpp2S",
    "DPMpp3M",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "PredictorCorrector",
    "RecoveryLangevin",
    "SASolver",
    "Solver",
    "UniPC",
    "create",
    "describe",
    "names",
]

# The public names, imported when they are first asked for.
_MODULES = {
    "latentdiff.diffusion.solver": ("Solver",),
    "latentdiff.solvers.adams": ("DEIS",),
    "latentdiff.solvers.ancestral": ("DDIM", "DDPM"),
    "latentdiff.solvers.churn": ("Churn",),
    "latentdiff.solvers.consistency": ("LCM", "TCD", "Consistency"),
    "latentdiff.solvers.dpm": ("DPM2", "DPMSolver3"),
    "latentdiff.solvers.dpmpp": ("DPMpp2M", "DPMpp2S", "DPMpp3M"),
    "latentdiff.solvers.edm": ("Euler", "Heun"),
    "latentdiff.solvers.gddim": ("GDDIM",),
    "latentdiff.solvers.langevin": ("AnnealedLangevin", "PredictorCorrector", "RecoveryLangevin"),
    "latentdiff.solvers.pndm": ("IPNDM", "PLMS", "PNDM"),
    "latentdiff.solvers.sde": ("EulerMaruyama", "SASolver"),
    "latentdiff.solvers.unipc": ("UniPC",),
}
_ON_DEMAND = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _ON_DEMAND:
        return getattr(import_module(_ON_DEMAND[name]), name)
    raise AttributeError(f"module 'latentdiff.solvers' has no attribute {name!r}")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A name's one line, and what builds it: "module:name", with the process where it asks between
    levels."""

    line: str
    builder: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    on_process: bool = False


_SOLVERS: dict[str, _Entry] = {
    "ddpm": _Entry(
        "ancestral sampling, the posterior's variance or a learned one (Ho 2020)", "ancestral:DDPM"
    ),
    "ddim": _Entry("first order; also DPM-Solver-1 (Song 2021)", "ancestral:DDIM"),
    "euler": _Entry("Euler in sigma / alpha (Karras 2022)", "edm:Euler"),
    "euler-a": _Entry(
        "ancestral Euler, DDIM with eta 1 (k-diffusion)", "ancestral:DDIM", {"eta": 1.0}
    ),
    "heun": _Entry("Heun in sigma / alpha, 2 calls a step (Karras 2022)", "edm:Heun"),
    "dpm2": _Entry("DPM-Solver-2, 2 calls a step (Lu 2022)", "dpm:DPM2", on_process=True),
    "dpm2-a": _Entry(
        "ancestral DPM2, 2 calls (k-diffusion)", "dpm:DPM2", {"eta": 1.0}, on_process=True
    ),
    "dpm-solver-1": _Entry("the same as ddim (Lu 2022)", "ancestral:DDIM"),
    "dpm-solver-2": _Entry("the same as dpm2 (Lu 2022)", "dpm:DPM2", on_process=True),
    "dpm-solver-3": _Entry(
        "exponential Runge-Kutta, 3 calls (Lu 2022)", "dpm:DPMSolver3", on_process=True
    ),
    "dpmpp-2s": _Entry(
        "DPM-Solver++(2S), 2 calls a step (Lu 2022b)", "dpmpp:DPMpp2S", on_process=True
    ),
    "dpmpp-2m": _Entry("DPM-Solver++(2M) (Lu 2022b)", "dpmpp:DPMpp2M"),
    "dpmpp-3m": _Entry("DPM-Solver++(3M), truly of third order (Lu 2022b)", "dpmpp:DPMpp3M"),
    "dpmpp-sde": _Entry(
        "DPM-Solver++(2S) on the reverse SDE, 2 calls",
        "dpmpp:DPMpp2S",
        {"eta": 1.0},
        on_process=True,
    ),
    "dpmpp-2m-sde": _Entry("DPM-Solver++(2M) on the reverse SDE", "dpmpp:DPMpp2M", {"eta": 1.0}),
    "dpmpp-3m-sde": _Entry("DPM-Solver++(3M) on the reverse SDE", "dpmpp:DPMpp3M", {"eta": 1.0}),
    "lms": _Entry(
        "linear multistep of order 4; rhoAB-DEIS", "adams:DEIS", {"order": 4, "variable": "rho"}
    ),
    "deis": _Entry("DEIS of order 3 in log rho (Zhang 2023)", "adams:DEIS"),
    "deis-2": _Entry("DEIS of order 2 in log rho (Zhang 2023)", "adams:DEIS", {"order": 2}),
    "deis-tab": _Entry(
        "tAB-DEIS of order 3 (Zhang 2023)",
        "adams:DEIS",
        {"order": 3, "variable": "t"},
        on_process=True,
    ),
    "deis-rhoab": _Entry(
        "rhoAB-DEIS of order 3 (Zhang 2023)", "adams:DEIS", {"order": 3, "variable": "rho"}
    ),
    "gddim": _Entry(
        "gDDIM-3: tAB, predicted and corrected, 2 calls (Zhang 2023b)",
        "gddim:GDDIM",
        on_process=True,
    ),
    "pndm": _Entry(
        "Runge-Kutta start, then Adams; 4 calls in 3 steps (Liu 2022)", "pndm:PNDM", on_process=True
    ),
    "plms": _Entry("PNDM as Stable Diffusion starts it (Liu 2022)", "pndm:PLMS"),
    "ipndm": _Entry("PNDM without a Runge-Kutta start (Zhang 2023)", "pndm:IPNDM"),
    "unipc": _Entry("UniPC-2, B2(h) (Zhao 2023)", "unipc:UniPC"),
    "unipc-bh1": _Entry(
        "UniPC-2, B1(h) (Zhao 2023)", "unipc:UniPC", {"degree": 2, "variant": "bh1"}
    ),
    "unipc-3": _Entry("UniPC-3, B2(h) (Zhao 2023)", "unipc:UniPC", {"degree": 3}),
    "sa-solver": _Entry("stochastic Adams, predictor and corrector (Xue 2023)", "sde:SASolver"),
    "euler-maruyama": _Entry(
        "the reverse SDE in t (Song 2021b)", "sde:EulerMaruyama", on_process=True
    ),
    "pc": _Entry(
        "ancestral steps, each corrected by Langevin's, 2 calls (Song 2021b)",
        "langevin:ancestral_corrector",
    ),
    "annealed-langevin": _Entry(
        "20 Langevin steps a level (Song 2019)", "langevin:AnnealedLangevin"
    ),
    "recovery-langevin": _Entry(
        "30 Langevin steps, held near the noisier x (Gao 2021)", "langevin:RecoveryLangevin"
    ),
    "rk45": _Entry(
        "adaptive Dormand-Prince, 6 calls a step; 1 step will do",
        "embedded_pairs:rk45",
        on_process=True,
    ),
    "dpm-adaptive": _Entry(
        "adaptive DPM-Solver-23, 3 calls; 1 step", "embedded_pairs:dpm_adaptive", on_process=True
    ),
    "sde-adaptive": _Entry(
        "adaptive SDE, 2 calls; 1 step", "embedded_pairs:sde_adaptive", on_process=True
    ),
    "consistency": _Entry("for consistency models (Song 2023)", "consistency:Consistency"),
    "lcm": _Entry("for latent consistency models (Luo 2023)", "consistency:LCM"),
    "tcd": _Entry(
        "for trajectory consistency distillation (Zheng 2024)", "consistency:TCD", on_process=True
    ),
}


def names() -> list[str]:
    """Every name that `create` knows."""
    return list(_SOLVERS)


def describe() -> dict[str, str]:
    """One line for each name."""
    return {name: entry.line for name, entry in _SOLVERS.items()}


def create(name: str, process: "Process | None" = None) -> "Solver":
    """A solver with its customary settings, by name; its class takes others.

    Args:
        name: one of `names()`.
        process: the process the run goes back along, for solvers that ask between two levels.

    Raises:
        UserError: unknown name, or no process for a solver that needs one.
    """
    check_name("solver", name, _SOLVERS)
    entry = _SOLVERS[name]
    if entry.on_process and process is None:
        raise UserError(f"the solver '{name}' asks between levels: create it with the process.")
    module, builder = entry.builder.split(":")
    build = getattr(import_module(f"latentdiff.solvers.{module}"), builder)
    return build(**entry.settings, **({"process": process} if entry.on_process else {}))

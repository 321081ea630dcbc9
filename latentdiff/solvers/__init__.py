"""Solvers by name; one file per family."""

from collections.abc import Callable
from dataclasses import dataclass

from latentdiff.diffusion.process import Process
from latentdiff.diffusion.solver import Solver
from latentdiff.errors import UserError
from latentdiff.registry import check_name
from latentdiff.solvers.adams import DEIS
from latentdiff.solvers.ancestral import DDIM, DDPM
from latentdiff.solvers.churn import Churn
from latentdiff.solvers.consistency import LCM, TCD, Consistency
from latentdiff.solvers.dpm import DPM2, DPMSolver3
from latentdiff.solvers.dpmpp import DPMpp2M, DPMpp2S, DPMpp3M
from latentdiff.solvers.edm import Euler, Heun
from latentdiff.solvers.embedded_pairs import dpm_adaptive, rk45, sde_adaptive
from latentdiff.solvers.gddim import GDDIM
from latentdiff.solvers.langevin import AnnealedLangevin, PredictorCorrector
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
    "SASolver",
    "Solver",
    "UniPC",
    "create",
    "describe",
    "names",
]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A name's one line, and how to build it: with the process where it asks between levels."""

    line: str
    build: Callable[[], Solver] | None = None
    build_on: Callable[[Process], Solver] | None = None


_SOLVERS: dict[str, _Entry] = {
    "ddpm": _Entry("ancestral sampling, the posterior's variance or a learned one (Ho 2020)", DDPM),
    "ddim": _Entry("first order; also DPM-Solver-1 (Song 2021)", DDIM),
    "euler": _Entry("Euler in sigma / alpha (Karras 2022)", Euler),
    "euler-a": _Entry("ancestral Euler, DDIM with eta 1 (k-diffusion)", lambda: DDIM(eta=1.0)),
    "heun": _Entry("Heun in sigma / alpha, 2 calls a step (Karras 2022)", Heun),
    "dpm2": _Entry("DPM-Solver-2, 2 calls a step (Lu 2022)", build_on=DPM2),
    "dpm2-a": _Entry("ancestral DPM2, 2 calls (k-diffusion)", build_on=lambda p: DPM2(p, eta=1.0)),
    "dpm-solver-1": _Entry("the same as ddim (Lu 2022)", DDIM),
    "dpm-solver-2": _Entry("the same as dpm2 (Lu 2022)", build_on=DPM2),
    "dpm-solver-3": _Entry("exponential Runge-Kutta, 3 calls (Lu 2022)", build_on=DPMSolver3),
    "dpmpp-2s": _Entry("DPM-Solver++(2S), 2 calls a step (Lu 2022b)", build_on=DPMpp2S),
    "dpmpp-2m": _Entry("DPM-Solver++(2M) (Lu 2022b)", DPMpp2M),
    "dpmpp-3m": _Entry("DPM-Solver++(3M), truly of third order (Lu 2022b)", DPMpp3M),
    "dpmpp-sde": _Entry(
        "DPM-Solver++(2S) on the reverse SDE, 2 calls", build_on=lambda p: DPMpp2S(p, eta=1.0)
    ),
    "dpmpp-2m-sde": _Entry("DPM-Solver++(2M) on the reverse SDE", lambda: DPMpp2M(eta=1.0)),
    "dpmpp-3m-sde": _Entry("DPM-Solver++(3M) on the reverse SDE", lambda: DPMpp3M(eta=1.0)),
    "lms": _Entry("linear multistep of order 4; rhoAB-DEIS", lambda: DEIS(4, "rho")),
    "deis": _Entry("DEIS of order 3 in log rho (Zhang 2023)", DEIS),
    "deis-2": _Entry("DEIS of order 2 in log rho (Zhang 2023)", lambda: DEIS(2)),
    "deis-tab": _Entry("tAB-DEIS of order 3 (Zhang 2023)", build_on=lambda p: DEIS(3, "t", p)),
    "deis-rhoab": _Entry("rhoAB-DEIS of order 3 (Zhang 2023)", lambda: DEIS(3, "rho")),
    "gddim": _Entry("gDDIM-3: tAB, predicted and corrected, 2 calls (Zhang 2023b)", build_on=GDDIM),
    "pndm": _Entry("Runge-Kutta start, then Adams; 4 calls in 3 steps (Liu 2022)", build_on=PNDM),
    "plms": _Entry("PNDM as Stable Diffusion starts it (Liu 2022)", PLMS),
    "ipndm": _Entry("PNDM without a Runge-Kutta start (Zhang 2023)", IPNDM),
    "unipc": _Entry("UniPC-2, B2(h) (Zhao 2023)", UniPC),
    "unipc-bh1": _Entry("UniPC-2, B1(h) (Zhao 2023)", lambda: UniPC(2, "bh1")),
    "unipc-3": _Entry("UniPC-3, B2(h) (Zhao 2023)", lambda: UniPC(3)),
    "sa-solver": _Entry("stochastic Adams, predictor and corrector (Xue 2023)", SASolver),
    "euler-maruyama": _Entry("the reverse SDE in t (Song 2021b)", build_on=EulerMaruyama),
    "pc": _Entry(
        "ancestral steps, each corrected by Langevin's, 2 calls (Song 2021b)",
        lambda: PredictorCorrector(DDIM(eta=1.0)),
    ),
    "annealed-langevin": _Entry("20 Langevin steps a level (Song 2019)", AnnealedLangevin),
    "rk45": _Entry("adaptive Dormand-Prince, 6 calls a step; 1 step will do", build_on=rk45),
    "dpm-adaptive": _Entry("adaptive DPM-Solver-23, 3 calls; 1 step", build_on=dpm_adaptive),
    "sde-adaptive": _Entry("adaptive SDE, 2 calls; 1 step", build_on=sde_adaptive),
    "consistency": _Entry("for consistency models (Song 2023)", Consistency),
    "lcm": _Entry("for latent consistency models (Luo 2023)", LCM),
    "tcd": _Entry("for trajectory consistency distillation (Zheng 2024)", build_on=TCD),
}


def names() -> list[str]:
    """Every name that `create` knows."""
    return list(_SOLVERS)


def describe() -> dict[str, str]:
    """One line for each name."""
    return {name: entry.line for name, entry in _SOLVERS.items()}


def create(name: str, process: Process | None = None) -> Solver:
    """A solver with its customary settings, by name; its class takes others.

    Args:
        name: one of `names()`.
        process: the process the run goes back along, for solvers that ask between two levels.

    Raises:
        UserError: unknown name, or no process for a solver that needs one.
    """
    check_name("solver", name, _SOLVERS)
    entry = _SOLVERS[name]
    if entry.build is not None:
        return entry.build()
    if process is None or entry.build_on is None:
        raise UserError(f"the solver '{name}' asks between levels: create it with the process.")
    return entry.build_on(process)

"""Solvers by name; one file per family."""

from collections.abc import Callable

from latentdiff.registry import check_name
from latentdiff.solvers.ancestral import DDIM, DDPM
from latentdiff.solvers.base import Solver
from latentdiff.solvers.churn import Churn
from latentdiff.solvers.dpmpp import DPMpp2M
from latentdiff.solvers.edm import Euler, Heun

__all__ = ["DDIM", "DDPM", "Churn", "DPMpp2M", "Euler", "Heun", "Solver", "create", "names"]

_BUILDERS: dict[str, Callable[[], Solver]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "euler-a": lambda: DDIM(eta=1.0),
    "heun": Heun,
    "dpmpp-2m": DPMpp2M,
}


def names() -> list[str]:
    """Every name that `create` knows."""
    return list(_BUILDERS)


def create(name: str) -> Solver:
    """A solver with its customary settings, by name; its class takes others.

    Raises:
        UserError: unknown name.
    """
    check_name("solver", name, _BUILDERS)
    return _BUILDERS[name]()

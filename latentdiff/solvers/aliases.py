"""The names that other tools give solvers and timetables: k-diffusion, A1111, ComfyUI, InvokeAI.

Many of them put both into one name: "DPM++ 2M Karras", "dpmpp_2m_sde_exponential", "heun_k". Only
names of the same method are here; another that sounds alike is refused with what is near.
"""

from latentdiff.diffusion import timetable as timetables
from latentdiff.errors import UserError
from latentdiff.registry import check_name, spelled
from latentdiff.solvers import names

# In the spelling of `registry.spelled`.
_SOLVERS = {
    "euler-ancestral": "euler-a",
    "dpm-2": "dpm2",
    "kdpm-2": "dpm2",
    "dpm2-ancestral": "dpm2-a",
    "dpm-2-a": "dpm2-a",
    "dpm-2-ancestral": "dpm2-a",
    "kdpm-2-a": "dpm2-a",
    "dpmpp-2m-sde-gpu": "dpmpp-2m-sde",
    "dpmpp-3m-sde-gpu": "dpmpp-3m-sde",
    "dpmpp-sde-gpu": "dpmpp-sde",
    "uni-pc-bh2": "unipc-3",
}
_TIMETABLES = {
    "k": "karras",
    "simple": "trailing",
    "sgm-uniform": "trailing",
    "normal": "linspace",
    "uniform": "linspace",
    "ddim-uniform": "leading",
    "align-your-steps": "ays-sd1",
    "ays": "ays-sd1",
}


def resolve(name: str) -> tuple[str, str | None]:
    """Our solver for a name of ours or another tool's, and the timetable if the name says one.

    Raises:
        UserError: unknown name.
    """
    if name in names():
        return name, None
    plain = spelled(name).removeprefix("k-")  # as k-diffusion's methods were called at first
    for timetable in (*timetables.names(), *_TIMETABLES, None):
        ending = "" if timetable is None else f"-{timetable}"
        stem = plain.removesuffix(ending)
        solver = _SOLVERS.get(stem, stem)
        if plain.endswith(ending) and solver in names():
            return solver, None if timetable is None else _TIMETABLES.get(timetable, timetable)
    check_name("solver", name, names())
    raise AssertionError(name)


def resolve_timetable(name: str) -> str | None:
    """Our timetable for a name of ours or another tool's; None for "automatic", the model's own.

    Raises:
        UserError: unknown name.
    """
    plain = spelled(name)
    if plain == "automatic":
        return None
    found = _TIMETABLES.get(plain, plain)
    if found not in timetables.names():
        check_name("timetable", name, timetables.names())
    return found


def resolve_both(solver: str | None, timetable: str | None) -> tuple[str | None, str | None]:
    """Our names for a solver and a timetable, of which the solver's name may say both.

    None stays None, and asks for the model's own.

    Raises:
        UserError: an unknown name, or two timetables.
    """
    named = None
    own, told = solver, timetable
    if solver is not None:
        own, named = resolve(solver)
    if timetable is not None:
        told = resolve_timetable(timetable)
    if named is not None and told not in (None, named):
        raise UserError(
            f"solver '{solver!s:.60}' says the timetable '{named}', and timetable '{told}': leave "
            "one of them out."
        )
    return own, told or named

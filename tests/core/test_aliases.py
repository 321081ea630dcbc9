"""Names of other tools: the solver and the timetable that they mean there."""

import pytest

from latentdiff import solvers
from latentdiff.diffusion import timetable
from latentdiff.errors import UserError
from latentdiff.solvers.aliases import resolve, resolve_both, resolve_timetable

NAMES = {
    # k-diffusion and ComfyUI
    "euler_ancestral": ("euler-a", None),
    "dpm_2_ancestral": ("dpm2-a", None),
    "dpmpp_2m": ("dpmpp-2m", None),
    "dpmpp_2m_karras": ("dpmpp-2m", "karras"),
    "dpmpp_2m_sde_gpu_exponential": ("dpmpp-2m-sde", "exponential"),
    "uni_pc_bh2": ("unipc-3", None),
    "euler_sgm_uniform": ("euler", "trailing"),
    "dpmpp_sde_simple": ("dpmpp-sde", "trailing"),
    "ddim_ddim_uniform": ("ddim", "leading"),
    # A1111
    "Euler a": ("euler-a", None),
    "DPM++ 2M Karras": ("dpmpp-2m", "karras"),
    "DPM++ 3M SDE Exponential": ("dpmpp-3m-sde", "exponential"),
    "DPM2 a Karras": ("dpm2-a", "karras"),
    "DPM adaptive": ("dpm-adaptive", None),
    "LMS Karras": ("lms", "karras"),
    "PLMS": ("plms", None),
    # InvokeAI
    "euler_a": ("euler-a", None),
    "kdpm_2_a_k": ("dpm2-a", "karras"),
    "heun_k": ("heun", "karras"),
    "dpmpp_3m_k": ("dpmpp-3m", "karras"),
    # of 2022
    "k_euler_a": ("euler-a", None),
    "k_dpm_2_a": ("dpm2-a", None),
    "k_lms": ("lms", None),
    # other spellings
    "UniPC": ("unipc", None),
    "dpmpp-2m  beta": ("dpmpp-2m", "beta"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_what_it_means_elsewhere(name: str) -> None:
    assert resolve(name) == NAMES[name]


@pytest.mark.parametrize("name", solvers.names())
def test_our_own_names_stay(name: str) -> None:
    assert resolve(name) == (name, None)
    assert resolve(f"{name.replace('-', '_').upper()} Karras") == (name, "karras")


@pytest.mark.parametrize(
    "name", ["uni_pc", "DPM++ 2S a", "dpmpp_2s_ancestral", "DPM fast", "karras", "", "euler_cfg_pp"]
)
def test_a_name_of_another_method_is_refused(name: str) -> None:
    """UniPC of order 3 with B1(h), 2S with ancestral noise: methods that are not here."""
    with pytest.raises(UserError, match="unknown solver"):
        resolve(name)


def test_a_timetable_is_said_once() -> None:
    assert resolve_both(None, None) == (None, None)
    assert resolve_both("DPM++ 2M Karras", None) == ("dpmpp-2m", "karras")
    assert resolve_both("DPM++ 2M Karras", "Karras") == ("dpmpp-2m", "karras")
    assert resolve_both("dpmpp_2m_karras", "Automatic") == ("dpmpp-2m", "karras")
    assert resolve_both("euler_a", "SGM Uniform") == ("euler-a", "trailing")
    with pytest.raises(UserError, match="says the timetable 'karras', and timetable 'exponential'"):
        resolve_both("DPM++ 2M Karras", "Exponential")


def test_timetables() -> None:
    named = {"Karras": "karras", "SGM Uniform": "trailing", "Align Your Steps": "ays-sd1"}
    named |= {"normal": "linspace", "ddim_uniform": "leading", "Exponential": "exponential"}
    assert {name: resolve_timetable(name) for name in named} == named
    assert resolve_timetable("Automatic") is None
    assert [resolve_timetable(name) for name in timetable.names()] == timetable.names()
    with pytest.raises(UserError, match="unknown timetable 'kl_optimal'"):
        resolve_timetable("kl_optimal")

"""The forward processes: against their definitions, their ends and their inverses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.diffusion import process
from latentdiff.diffusion.prediction import to_x0
from latentdiff.diffusion.process import DiscreteVP, NoiseLevel, transition
from latentdiff.errors import UserError

PROCESSES = {name: process.create(name) for name in process.names()}
any_process = st.sampled_from(list(PROCESSES.values()))
unit = st.floats(0, 1)


@given(any_process, unit)
def test_t_is_the_inverse_of_its_log_snr(where: process.Process, u: float) -> None:
    t = where.t_min + u * (where.t_max - where.t_min)
    assert where.t_of_log_snr(where.log_snr(t)) == pytest.approx(t, abs=1e-9 * where.t_max)


@given(any_process, unit, unit)
def test_noise_only_grows(where: process.Process, a: float, b: float) -> None:
    low, high = sorted(where.t_min + u * (where.t_max - where.t_min) for u in (a, b))
    assert where.log_snr(low) >= where.log_snr(high)


@given(st.sampled_from([p for name, p in PROCESSES.items() if name.startswith("vp")]), unit)
def test_vp_preserves_variance(where: process.Process, u: float) -> None:
    level = where.level(where.t_min + u * (where.t_max - where.t_min))
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-12)
    assert where.prior_scale(level) == pytest.approx(1)


@given(any_process, unit, unit, unit)
def test_forward_kernels_compose(where: process.Process, a: float, b: float, c: float) -> None:
    """q(x_c | x_a) is q(x_b | x_a) followed by q(x_c | x_b)."""
    times = sorted(where.t_min + u * (where.t_max - where.t_min) for u in (a, b, c))
    first, second, third = (where.level(t) for t in times)
    near, far, whole = (
        transition(first, second),
        transition(second, third),
        transition(first, third),
    )
    assert near[0] * far[0] == pytest.approx(whole[0], rel=1e-9, abs=1e-12)
    variance = (far[0] * near[1]) ** 2 + far[1] ** 2
    assert variance == pytest.approx(whole[1] ** 2, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    "name", [n for n in process.names() if n.startswith("vp") and n != "vp-continuous"]
)
def test_whole_times_are_the_products_of_the_betas(name: str) -> None:
    """DDPM eq. 4, with the product taken in exact order, at every time of the schedule."""
    where = process.create(name)
    assert isinstance(where, DiscreteVP)
    alpha, sigma = where.alpha_sigma(torch.arange(1000))
    product = np.multiply.accumulate(1 - where.betas)
    np.testing.assert_allclose(alpha.numpy() ** 2, product, rtol=1e-10, atol=1e-30)
    np.testing.assert_allclose(sigma.numpy() ** 2, 1 - product, rtol=1e-9)
    np.testing.assert_allclose(where.alphas_cumprod, product, rtol=1e-10, atol=1e-30)


@pytest.mark.parametrize("kind", ["linear", "scaled-linear", "cosine", "sigmoid"])
def test_zero_terminal_snr_moves_only_the_end(kind: str) -> None:
    plain, moved = process.create(f"vp-{kind}"), process.create(f"vp-{kind}-zsnr")
    assert moved.level(999) == NoiseLevel(999.0, 0.0, 1.0)
    assert moved.level(0).alpha == pytest.approx(plain.level(0).alpha, rel=1e-12)
    # Algorithm 1 is one shift and one scale of sqrt(alphas_cumprod): every second difference
    # keeps its proportion to every other.
    times = torch.tensor([0.0, 250.0, 500.0, 999.0])
    before, after = plain.alpha_sigma(times)[0].diff(), moved.alpha_sigma(times)[0].diff()
    torch.testing.assert_close(after / after[0], before / before[0])


def test_continuous_vp_solves_its_sde() -> None:
    """d ln alpha / dt = -beta(t) / 2 with beta(t) = 0.1 + 19.9 t (Song et al. 2021, appendix C)."""
    where, h = process.create("vp-continuous"), 1e-5
    for t in (0.1, 0.5, 0.9):
        slope = (math.log(where.level(t + h).alpha) - math.log(where.level(t - h).alpha)) / (2 * h)
        assert slope == pytest.approx(-(0.1 + 19.9 * t) / 2, rel=1e-6)


def test_ve_edm_and_flow_are_what_their_papers_say() -> None:
    ve, edm, flow = process.create("ve"), process.create("edm"), process.Flow()
    assert ve.level(0.5).sigma == pytest.approx(math.sqrt(0.01 * 50))
    assert ve.prior_scale(ve.level(1)) == pytest.approx(50)
    assert edm.level(edm.t_max).sigma == pytest.approx(80)
    assert edm.level(math.log(3) / 4).sigma == pytest.approx(3)
    assert flow.level(0.3) == NoiseLevel(0.3, 0.7, 0.3)
    assert flow.level(1.0) == NoiseLevel(1.0, 0.0, 1.0)
    assert process.create("flow").level(300.0) == NoiseLevel(300.0, 0.7, 0.3)


def test_v_on_edm_is_edms_preconditioning() -> None:
    """Karras et al. 2022, table 1, sigma_data = 1: D = c_skip x + c_out F(c_in x), with F = -v."""
    edm, sigma = process.create("edm"), 3.0
    x, output = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).split(1)
    root = math.sqrt(1 + sigma**2)
    assert edm.input_scale(1.0, sigma) == pytest.approx(1 / root)
    expected = x / (sigma**2 + 1) + sigma / root * -output
    torch.testing.assert_close(to_x0("v", output, x, 1.0, sigma), expected)


def test_tensors_and_numbers_agree_in_any_shape_and_dtype() -> None:
    t = torch.tensor([[0.0, 12.25], [998.5, 999.0]])
    for where in (process.create("vp-scaled-linear"), process.create("vp-cosine-zsnr")):
        alpha, sigma = where.alpha_sigma(t)
        assert alpha.shape == t.shape
        assert alpha.dtype == sigma.dtype == torch.float64
        for row, column in ((0, 1), (1, 0), (1, 1)):
            level = where.level(t[row, column].item())
            assert (alpha[row, column], sigma[row, column]) == (level.alpha, level.sigma)


@pytest.mark.parametrize("betas", [[0.1], [0.1, 0.0], [1.0, 0.1], [0.1, 1.5], [0.1, math.nan]])
def test_impossible_betas_are_refused(betas: list[float]) -> None:
    with pytest.raises(UserError, match="betas must"):
        DiscreteVP(np.array(betas))


@pytest.mark.parametrize(
    ("typed", "meant"), [("vp_scaled_linear", "vp-scaled-linear"), ("Flow", "flow")]
)
def test_an_unknown_name_is_answered_with_the_closest(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"unknown process '{typed}': did you mean '{meant}'"):
        process.create(typed)
    with pytest.raises(UserError, match="choose one of: linear, scaled-linear, cosine, sigmoid"):
        process.beta_schedule("quadratic of sorts")

"""Likelihoods in bits per dimension, against the closed form of a Gaussian."""

import math

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion import process, timetable
from latentdiff.diffusion.likelihood import flow_bits, variational_bound
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian
from latentdiff.errors import UserError
from latentdiff.solvers.ancestral import Variance

MEAN = torch.tensor([0.3, -0.5], dtype=torch.float64)
DIAGONAL = torch.tensor([[1.0, 0.0], [0.0, 0.3]], dtype=torch.float64)
CORRELATED = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64)


def draws(covariance: Tensor, side: int) -> Tensor:
    factor = torch.linalg.cholesky(covariance)
    z = NoiseStreams(5, count=2).draw((2, side, side)).double()
    return torch.einsum("cd,bdhw->bchw", factor, z) + MEAN[:, None, None]


def exact_bits(covariance: Tensor, x: Tensor) -> Tensor:
    """-log2 N(x; m, S) of each picture, per dimension."""
    away = x - MEAN[:, None, None]
    inverse = torch.linalg.inv(covariance)
    square = torch.einsum("bchw,cd,bdhw->bhw", away, inverse, away)
    nats = 0.5 * (square + torch.linalg.slogdet(covariance)[1] + 2 * math.log(2 * math.pi))
    return nats.flatten(1).mean(1) / (2 * math.log(2))


@pytest.mark.parametrize("kind", ["vp-continuous", "sub-vp", "ve", "flow"])
@pytest.mark.parametrize("covariance", [DIAGONAL, CORRELATED], ids=["diagonal", "correlated"])
def test_the_flows_likelihood_is_exact(kind: str, covariance: Tensor) -> None:
    """Within 2e-3 bits/dim; for the correlated one thousands of pixels average the probes."""
    side = 8 if covariance is DIAGONAL else 64
    x = draws(covariance, side)
    noise = NoiseStreams(0, count=2)
    got = flow_bits(Gaussian(MEAN, covariance), x, process.create(kind), noise, probes=2, steps=32)
    assert (got - exact_bits(covariance, x)).abs().max() < 2e-3


@pytest.mark.parametrize("kind", ["vp-continuous", "ve"])
@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
def test_the_bound_is_above_and_comes_near(kind: str, variance: Variance) -> None:
    where = process.create(kind)
    x = draws(CORRELATED, 32)
    exact = exact_bits(CORRELATED, x).mean()
    gaps = []
    for steps in (25, 75, 225):
        levels = timetable.create("exponential", where, steps)
        bound = variational_bound(
            Gaussian(MEAN, CORRELATED),
            x,
            where,
            levels,
            NoiseStreams(1, count=2),
            variance=variance,
        )
        assert bound.steps.shape == (steps - 1, 2)
        torch.testing.assert_close(
            bound.total, bound.prior + bound.steps.sum(0) + bound.reconstruction
        )
        gaps.append((bound.total.mean() - exact).item())
    assert min(gaps) > -0.02
    assert gaps[2] < 0.25
    if variance == "fixed-small":  # whose gap is more than chance: it falls as 1 / steps
        assert gaps[0] > gaps[1] > gaps[2]


def test_bins_are_densities_when_they_are_fine() -> None:
    where = process.create("vp-continuous")
    x = draws(DIAGONAL, 8)
    levels = timetable.create("exponential", where, 5)
    data = Gaussian(MEAN, DIAGONAL)
    density, bins = (
        variational_bound(data, x, where, levels, NoiseStreams(1, count=2), bin_width=width)
        for width in (None, 1e-6)
    )
    gap = bins.reconstruction - density.reconstruction
    torch.testing.assert_close(gap, torch.full_like(gap, -math.log2(1e-6)), atol=1e-3, rtol=0)


def test_mistakes_are_named() -> None:
    where, noise = process.create("ve"), NoiseStreams(0, count=2)
    data, x = Gaussian(MEAN, DIAGONAL), draws(DIAGONAL, 2)
    levels = timetable.create("karras", where, 4)
    for wrong in (levels[-2:], levels[:-1], [levels[1], *levels]):
        with pytest.raises(UserError, match="the bound needs"):
            variational_bound(data, x, where, wrong, noise)
    with pytest.raises(UserError, match="at least 1 probe"):
        flow_bits(data, x, where, noise, probes=0)

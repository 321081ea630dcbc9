"""Guidance by a score of x_0 against the closed form, both ways through and past the network."""

import math

import pytest
import torch
from torch import Tensor

from latentdiff import guidance
from latentdiff.diffusion import process
from latentdiff.diffusion.denoiser import Estimate
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError

X = NoiseStreams(0, count=3).draw((2, 4, 4)).double()
SLOPE = torch.tensor([0.8, -1.5]).double().view(2, 1, 1)


def score(x0: Tensor) -> Tensor:
    """Linear, so that exp(score) makes of a Gaussian another one."""
    return (SLOPE * x0).sum((1, 2, 3))


@pytest.mark.parametrize("kind", ["vp-linear", "ve", "flow"])
@pytest.mark.parametrize("through", [True, False])
def test_a_tilted_gaussian(kind: str, through: bool) -> None:
    """N(m, C) exp(s score) is N(m + s C slope, C): the guided denoiser is that one's own.

    Past the network that holds for the identity as C, which is what is then assumed.
    """
    where, mean = process.create(kind), torch.tensor([0.3, -0.2]).double()
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.9]] if through else [[1.0, 0.0], [0.0, 1.0]])
    covariance = covariance.double()
    guided = guidance.from_estimate(
        Gaussian(mean, covariance), score, strength=0.7, through=through
    )
    tilted = Gaussian(mean + 0.7 * covariance @ SLOPE.flatten(), covariance)
    for part in (0.2, 0.5, 0.9):
        level = where.level(where.t_min + part * (where.t_max - where.t_min))
        with torch.no_grad():  # as the pipeline runs
            got, expected = guided(X, level).x0, tilted(X, level).x0
            torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def test_off_outside_its_interval_and_at_pure_noise() -> None:
    level = process.Flow().level(0.5)

    def half(x: Tensor, level: NoiseLevel) -> Estimate:
        return Estimate(x / 2, x.square())

    assert guidance.from_estimate(half, score, strength=0.0) is half
    above = guidance.from_estimate(half, score, strength=1.0, interval=(level.ratio, math.inf))
    assert torch.equal(above(X, level).x0, X / 2)
    noise = process.Flow().level(1.0)
    assert torch.equal(guidance.from_estimate(half, score, strength=1.0)(X, noise).x0, X / 2)
    past = guidance.from_estimate(half, score, strength=1.0, through=False)
    torch.testing.assert_close(past(X, noise).x0, X / 2 + SLOPE.expand_as(X))
    through = guidance.from_estimate(half, score, strength=1.0)
    for guided in (through, past):  # a learned variance stays the network's own
        torch.testing.assert_close(guided(X, level).variance, X.square(), rtol=0, atol=0)
    wrong = ((math.inf, (0.0, 1.0), "strength: must be a finite"), (1.0, (1.0, 0.0), "an interval"))
    for strength, interval, told in wrong:
        with pytest.raises(UserError, match=told):
            guidance.from_estimate(half, score, strength=strength, interval=interval)

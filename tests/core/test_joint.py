"""The bound of both stages, against Gaussians in closed form."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.process import (
    ContinuousVP,
    DiscreteVP,
    NoiseLevel,
    Process,
    beta_schedule,
)
from latentdiff.diffusion.variance import gaussian_surprise
from latentdiff.learning.distillation import Levels, noised
from latentdiff.learning.joint import (
    cross_entropy,
    entropy,
    eps_of_v,
    even_in_log_snr,
    graded,
    unweighted,
)


def level_of(log_snr: float) -> NoiseLevel:
    """A level of a variance-preserving process."""
    alpha, sigma = (math.sqrt(1 / (1 + math.exp(-s * log_snr))) for s in (1, -1))
    return NoiseLevel(0.0, alpha, sigma)


def mixed_eps(z: Tensor, eps: Tensor, mixing: Tensor, level: Levels) -> Tensor:
    """sigma (1 - a) z_t + a eps': Vahdat et al. 2021, section 3.2, with a of each channel [C]."""
    a = mixing.view(1, -1, 1, 1)
    return level.sigma.to(z) * (1 - a) * z + a * eps


FIRST, LAST = level_of(-12.0), level_of(20.0)


def nodes() -> list[tuple[NoiseLevel, float]]:
    """Levels between both, and weights of sum 1: Gauss-Legendre, for the mean over log-SNR."""
    places, weights = np.polynomial.legendre.leggauss(120)
    middle, half = (LAST.log_snr + FIRST.log_snr) / 2, (LAST.log_snr - FIRST.log_snr) / 2
    return [(level_of(middle + half * p), w / 2) for p, w in zip(places, weights, strict=True)]


def points(size: int) -> Tensor:
    """Noise [2 size, size] whose mean of any quadratic is that of standard normal noise."""
    eye = math.sqrt(size) * torch.eye(size, dtype=torch.float64)
    return torch.cat([eye, -eye])


def crossed(mean: Tensor, std: Tensor, a: float) -> Tensor:
    """CE of N(mean, std^2), numbers [D], to a prior of the mixed score a; exactly, as eps' = 0."""
    size = len(mean)
    noise = points(2 * size)
    latents = (mean + std * noise[:, :size])[:, :, None, None]
    eps = noise[:, size:, None, None]
    total = torch.zeros(len(noise), dtype=torch.float64)
    for level, weight in nodes():
        many = Levels.of([level] * len(noise))
        z = noised(latents, eps, many)
        guess = mixed_eps(z, torch.zeros_like(z), torch.full((size,), a).double(), many)
        errors = (eps - guess).square().flatten(1).sum(1)
        total += weight * errors
    return cross_entropy(total, latents, FIRST, LAST, 1.0).mean()


def test_the_cross_entropy_is_that_of_two_gaussians() -> None:
    """N(0.9, 0.3) to N(0, 1), whose mixing coefficient is 0: 1.473939."""
    got = crossed(torch.tensor([0.9]).double(), torch.tensor([0.3]).double().sqrt(), 0.0)
    exact = 0.5 * math.log(2 * math.pi) + 0.5 * (0.9**2 + 0.3)
    assert exact == pytest.approx(1.473939, abs=5e-7)
    assert got.item() == pytest.approx(exact, abs=1e-6)
    off = crossed(torch.tensor([0.9]).double(), torch.tensor([0.3]).double().sqrt(), 0.1)
    assert off > exact + 0.03  # another score is worse


def test_the_bound_of_probabilistic_pca_is_its_likelihood() -> None:
    """With the true posterior and the true prior, picture by picture; with another it is above."""
    columns = torch.tensor([[0.8, 0.3], [0.4, -0.6], [-0.2, 0.0]], dtype=torch.float64)
    noise = 0.5
    assert abs(columns[:, 0] @ columns[:, 1]) < 1e-12  # so the posterior is of independent numbers
    variance = 1 / (1 + columns.square().sum(0) / noise**2)

    def bound(x: Tensor, mean: Tensor) -> float:
        z = mean + variance.sqrt() * points(2)
        told = gaussian_surprise(x - z @ columns.T, math.log(noise)).sum(1).mean()
        held = entropy(0.5 * variance.log().view(1, 2, 1, 1))[0]
        return (told - held + crossed(mean, variance.sqrt(), 0.0)).item()

    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(3).double(), columns @ columns.T + noise**2 * torch.eye(3).double()
    )
    for x in torch.tensor([[0.5, -0.3, 1.0], [2.0, 0.1, -0.7]], dtype=torch.float64):
        mean = variance * (x @ columns) / noise**2
        exact = -marginal.log_prob(x).item()
        assert bound(x, mean) == pytest.approx(exact, abs=1e-6)
        assert bound(x, mean + 0.3) > exact + 0.05


def test_a_mixed_score_is_a_times_v() -> None:
    random = torch.Generator().manual_seed(0)
    z, v = torch.randn(2, 3, 4, 2, 2, generator=random, dtype=torch.float64)
    level = Levels.of([level_of(value) for value in (-3.0, 0.0, 4.0)])
    a = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    mixed = mixed_eps(z, eps_of_v(z, v, level), a, level)
    assert (mixed - eps_of_v(z, a.view(1, -1, 1, 1) * v, level)).abs().max() < 1e-12
    assert torch.equal(mixed[:, 0], (level.sigma * z)[:, 0])  # the score of N(0, 1)


@pytest.mark.parametrize(
    "process", [DiscreteVP(beta_schedule("scaled-linear")), ContinuousVP()], ids=["discrete", "sde"]
)
def test_weights_turn_times_even_in_log_snr_into_even_times(process: Process) -> None:
    shares = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500
    levels = even_in_log_snr(process, shares.tolist())
    found = torch.tensor([level.log_snr for level in levels])
    steps = found.diff()
    assert (steps - steps.mean()).abs().max() < 1e-6
    weights = unweighted(process, levels)
    times = torch.tensor([level.t for level in levels]).double()
    middle = (process.t_min + process.t_max) / 2
    assert weights.mean().item() == pytest.approx(1, abs=0.01)
    assert (weights * times).mean().item() == pytest.approx(middle, rel=0.01)


def test_a_graded_gradient_is_scaled_and_its_value_is_not() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    same = graded(x, torch.tensor([0.5, 3.0]))
    assert torch.equal(same, x)
    (slope,) = torch.autograd.grad(same.square().sum(), x)
    torch.testing.assert_close(slope, 2 * x.detach() * torch.tensor([[0.5], [3.0]]))

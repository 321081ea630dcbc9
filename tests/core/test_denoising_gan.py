"""Denoising diffusion GANs: their pairs, their losses, and a generator of one dimension."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from latentdiff.diffusion import timetable
from latentdiff.diffusion.denoiser import Estimate
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import DiscreteVP, Flow, NoiseLevel, Process, beta_schedule
from latentdiff.learning.denoising_gan import (
    discriminator_loss,
    draw_codes,
    forward_pair,
    generator_loss,
    gradient_penalty,
    posterior_draw,
)
from latentdiff.learning.distillation import Levels, noised
from latentdiff.solvers import DDPM

VP = DiscreteVP(beta_schedule("scaled-linear"))
WEIGHTS, MEANS, STD = torch.tensor([0.3, 0.7]).double(), torch.tensor([-1.0, 0.8]).double(), 0.1


def normal(seed: int, count: int) -> Tensor:
    """[count, 1, 1, 1] standard normal."""
    return torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed)).double()


def uniform(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).double()


def data(seed: int, count: int) -> Tensor:
    """Draws of the mixture."""
    which = (uniform(seed, count) > WEIGHTS[0]).long()
    return MEANS[which].view(-1, 1, 1, 1) + STD * normal(seed + 1, count)


def given(x: float, level: NoiseLevel) -> tuple[Tensor, Tensor, float]:
    """Weights, means and deviation of the mixture that x_0 given x_t is."""
    spread = level.alpha**2 * STD**2 + level.sigma**2
    away = x - level.alpha * MEANS
    weights = (WEIGHTS.log() - 0.5 * away**2 / spread).softmax(0)
    means = MEANS + level.alpha * STD**2 / spread * away
    return weights, means, STD * level.sigma / math.sqrt(spread)


def step_from(x: float, here: NoiseLevel, there: NoiseLevel, count: int, seed: int) -> Tensor:
    """Draws of q(x_there | x_here) in closed form: x_0 first, then the posterior of DDPM."""
    weights, means, std = given(x, here)
    which = (uniform(seed, count) > weights[0]).long()
    x0 = means[which].view(-1, 1, 1, 1) + std * normal(seed + 1, count)
    many, few = Levels.of([here] * count), Levels.of([there] * count)
    return posterior_draw(x0, torch.full_like(x0, x), normal(seed + 2, count), many, few)


def distance(one: Tensor, other: Tensor) -> float:
    """Wasserstein-1 of as many draws of each."""
    return (one.flatten().sort().values - other.flatten().sort().values).abs().mean().item()


def best_gaussian(draws: Tensor, seed: int) -> Tensor:
    """Draws of the Gaussian of the same mean and deviation, which a step of DDPM at best is."""
    return draws.mean() + draws.std() * normal(seed, len(draws))


@pytest.mark.parametrize("process", [VP, Flow(1000.0)], ids=["vp", "flow"])
def test_pairs_are_those_of_the_process_and_steps_those_of_ddpm(process: Process) -> None:
    """Both ends of a pair have the marginal of their level, given x_0, and the covariance between
    them; and of a made x_0 a step is that of the solver, number by number."""
    levels = timetable.create("trailing", process, 4)
    count = 200_000
    x0 = torch.full((count, 1, 1, 1), 0.7).double()
    for here, there in pairwise(levels):
        many, few = Levels.of([here] * count), Levels.of([there] * count)
        cleaner, noisier = forward_pair(x0, normal(1, count), normal(2, count), many, few)
        scale = here.alpha / there.alpha
        pair = torch.cat([cleaner - there.alpha * 0.7, noisier - here.alpha * 0.7], 1).flatten(1)
        got = pair.T @ pair / count
        between = scale * there.sigma**2
        expected = torch.tensor([[there.sigma**2, between], [between, here.sigma**2]]).double()
        assert (got - expected).abs().max() < 0.01
        stream = NoiseStreams(3)
        x, made = (torch.linspace(-2, 2, 64).view(1, 1, 8, 8).double() * k for k in (1, 0.3))
        stepped = DDPM().step(lambda *_, m=made: Estimate(m), x, here, there, None, stream)[0]
        noise = NoiseStreams(3).like(x)
        one = Levels.of([here]), Levels.of([there])
        assert (posterior_draw(made, x, noise, *one) - stepped).abs().max() < 1e-12


def test_a_step_of_many_shapes_is_nearer_than_any_gaussian() -> None:
    """T = 2: pairs of the process, picked where x_here is near x, beside q(x_there | x) drawn."""
    _, here, there = timetable.create("trailing", VP, 2)
    x, count = -0.05, 100_000
    pool = 4_000_000
    x0 = data(0, pool)
    noisier = noised(x0, normal(3, pool), Levels.of([here]))
    near = x0[(noisier - x).abs().flatten() < 0.02][:count]  # there is no noise at `there`
    found = step_from(x, here, there, len(near), 10)
    exact = distance(near, found)
    assert len(near) > 20_000
    assert exact < 0.02
    assert distance(near, best_gaussian(near, 20)) > 0.2
    assert there.sigma == 0


def test_the_perfect_discriminator_is_the_ratio_and_at_the_optimum_the_loss_is_log_4() -> None:
    """Goodfellow et al. 2014: four values drawn 1 to 4 and 4 to 1 times of ten."""
    real, made = (
        torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3]),
        torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3]),
    )
    ratio = torch.tensor([1 / 4, 2 / 3, 3 / 2, 4], dtype=torch.float64).log().requires_grad_()
    loss = discriminator_loss(ratio[real], ratio[made])
    (slope,) = torch.autograd.grad(loss, ratio)
    assert slope.abs().max() < 1e-12
    middle = torch.tensor([1, 2, 3, 4]).double() / 10
    other, half = middle.flip(0), torch.full((4,), 0.25).double()
    divergence = torch.stack([p * (p / half).log() for p in (middle, other)]).sum() / 2
    assert loss.item() == pytest.approx(math.log(4) - 2 * divergence.item(), abs=1e-12)
    nothing = torch.zeros(4).double()
    assert discriminator_loss(nothing, nothing).item() == pytest.approx(math.log(4), abs=1e-12)
    assert generator_loss(nothing).item() == pytest.approx(math.log(2), abs=1e-12)


def test_r1_is_half_the_squared_slope() -> None:
    slope = torch.tensor([0.5, -2.0, 1.0]).view(1, 3, 1, 1)
    real = torch.ones(4, 3, 1, 1, requires_grad=True)
    assert gradient_penalty((slope * real).sum((1, 2, 3)), real).item() == pytest.approx(5.25 / 2)


def test_a_generator_learns_the_shape_that_no_gaussian_has() -> None:
    """The second of two steps, on the mixture; its distance is at most half of the Gaussian's."""
    torch.manual_seed(0)
    _, here, there = timetable.create("trailing", VP, 2)

    def network(inside: int) -> nn.Sequential:
        layers = [nn.Linear(inside, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2)]
        return nn.Sequential(*layers, nn.Linear(64, 1))

    maker, critic = network(3), network(2)
    slow, fast = (
        torch.optim.Adam(net.parameters(), lr=rate, betas=(0.5, 0.9))
        for net, rate in ((maker, 1e-3), (critic, 2e-3))
    )
    batch = 256
    levels = Levels.of([here] * batch), Levels.of([there] * batch)

    def made(x: Tensor, codes: Tensor) -> Tensor:
        return maker(torch.cat([x.flatten(1), codes], 1)).view(-1, 1, 1, 1)

    def told(one: Tensor, x: Tensor) -> Tensor:
        return critic(torch.cat([one.flatten(1), x.flatten(1)], 1))[:, 0]

    for step in range(1200):
        seed = 10 * step + 1000
        real, x = (
            each.float()
            for each in forward_pair(
                data(seed, batch), normal(seed + 3, batch), normal(seed + 4, batch), *levels
            )
        )
        codes = torch.cat([normal(seed + k, batch).flatten(1) for k in (5, 6)], 1).float()
        x0 = made(x, codes)
        fake = posterior_draw(x0, x, torch.zeros_like(x), *levels)
        real.requires_grad_()
        logits = told(real, x)
        loss = discriminator_loss(logits, told(fake.detach(), x))
        fast.zero_grad()
        (loss + 0.05 * gradient_penalty(logits, real)).backward()
        fast.step()
        slow.zero_grad()
        generator_loss(told(fake, x)).backward()
        slow.step()
    count = 20_000
    for x in (-0.3, 0.0, 0.2):
        exact = step_from(x, here, there, count, 7)
        with torch.no_grad():
            drawn = made(torch.full((count, 1, 1, 1), x), draw_codes(1, 0, range(count), 2))
        ours, gaussian = distance(exact, drawn.double()), distance(exact, best_gaussian(exact, 9))
        assert ours < 0.5 * gaussian, (x, ours, gaussian)

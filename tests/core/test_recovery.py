"""Energy-based models by recovery likelihood, against Gaussians in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn

from latentdiff.diffusion.process import DiscreteVP, NoiseLevel, beta_schedule
from latentdiff.learning.denoising_gan import forward_pair, kernel
from latentdiff.learning.distillation import Levels
from latentdiff.learning.recovery import recovery_langevin, recovery_loss

MEAN, STD, SIGMA, NOISY = 0.7, 0.5, 0.4, 1.3
VP = DiscreteVP(beta_schedule("scaled-linear"))
COSINE = DiscreteVP(beta_schedule("cosine"))  # which begins with hardly any signal


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean: float, std: float):
    return lambda x: -0.5 * ((x - mean) / std).square().flatten(1).sum(1)


def draws(here: NoiseLevel, there: NoiseLevel, x: float, size: float, steps: int) -> Tensor:
    """Langevin draws from p(x_there | x_here = x) of N(MEAN, STD^2) data."""
    count = 40_000
    spread = math.hypot(there.alpha * STD, there.sigma)
    return recovery_langevin(
        gaussian(there.alpha * MEAN, spread),
        torch.full((count, 1, 1, 1), x, dtype=torch.float64),
        Levels.of([here] * count),
        Levels.of([there] * count),
        normal(0, steps, count, 1, 1, 1),
        size,
    )


def test_langevin_ends_with_the_mean_and_the_variance_of_the_conditional() -> None:
    """x + noise of 0.4: N(1.0659, 0.0976). Steps of size h widen it by 1 / (1 - h P / 4)."""
    here, there = NoiseLevel(1.0, 1.0, SIGMA), NoiseLevel(0.0, 1.0, 0.0)
    precision = 1 / STD**2 + 1 / SIGMA**2
    mean = (MEAN / STD**2 + NOISY / SIGMA**2) / precision
    assert (mean, 1 / precision) == pytest.approx((1.0659, 0.0976), abs=5e-5)
    for size, steps in ((0.02, 400), (0.2, 60)):
        x = draws(here, there, NOISY, size, steps)
        wide = 1 / (1 - size * SIGMA**2 / (1 + SIGMA**2) * precision / 4)
        assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(0.1 / 40_000))
        assert x.var().item() * precision == pytest.approx(wide, rel=5 * math.sqrt(2 / 40_000))


@pytest.mark.parametrize("times", [(999.0, 832.0), (332.0, 165.0)])
@pytest.mark.parametrize("process", [VP, COSINE], ids=["scaled-linear", "cosine"])
def test_so_it_does_where_the_signal_is_scaled(
    process: DiscreteVP, times: tuple[float, float]
) -> None:
    """Between levels of a variance-preserving process: Bayes' rule for two Gaussians."""
    here, there = (process.level(t) for t in times)
    scale, std = (part.item() for part in kernel(Levels.of([there]), Levels.of([here])))
    prior = (there.alpha * STD) ** 2 + there.sigma**2
    precision = 1 / prior + (scale / std) ** 2
    mean = (there.alpha * MEAN / prior + scale * 0.4 / std**2) / precision
    x = draws(here, there, 0.4, 0.05, 200)
    assert x.mean().item() == pytest.approx(mean, abs=0.01)
    assert x.var().item() * precision == pytest.approx(1, abs=0.05)


def test_the_gradient_is_zero_at_the_truth_and_leads_there() -> None:
    """Pairs of data; draws from the conditional in closed form. The loss's own gradient."""
    here, there = Levels.of([VP.level(332.0)]), Levels.of([VP.level(165.0)])
    count = 200_000
    x0 = MEAN + STD * normal(1, count, 1, 1, 1)
    real, x = forward_pair(x0, normal(2, count, 1, 1, 1), normal(3, count, 1, 1, 1), here, there)
    scale, std = (part.item() for part in kernel(there, here))
    alpha, sigma = there.alpha.item(), there.sigma.item()

    def slopes(mean: float, deviation: float) -> list[float]:
        """d loss / d mean and d log deviation, where both are the model's."""
        parameters = torch.tensor([mean, math.log(deviation)]).double().requires_grad_()

        def density(x: Tensor) -> Tensor:
            away = (x - parameters[0]) / parameters[1].exp()
            return -0.5 * away.square().flatten(1).sum(1)

        precision = 1 / deviation**2 + (scale / std) ** 2
        centre = (mean / deviation**2 + scale / std**2 * x) / precision
        made = centre + normal(4, count, 1, 1, 1) / math.sqrt(precision)
        loss = recovery_loss(density(real), density(made))
        return torch.autograd.grad(loss, parameters)[0].tolist()

    mean, deviation = alpha * MEAN, math.hypot(alpha * STD, sigma)
    assert max(map(abs, slopes(mean, deviation))) < 0.01
    assert slopes(mean + 0.2, deviation)[0] > 0.05
    assert slopes(mean - 0.2, deviation)[0] < -0.05
    assert slopes(mean, 1.3 * deviation)[1] > 0.03
    assert slopes(mean, deviation / 1.3)[1] < -0.03


def test_an_energy_learns_a_gaussian_by_its_own_draws() -> None:
    """Two numbers, from N(0, 1) on, with 30 steps of Langevin dynamics for each draw."""
    here, there = NoiseLevel(1.0, 1.0, SIGMA), NoiseLevel(0.0, 1.0, 0.0)
    batch = 512
    many, few = Levels.of([here] * batch), Levels.of([there] * batch)
    learned = nn.Parameter(torch.tensor([0.0, 0.0], dtype=torch.float64))  # mean, log deviation
    optimizer = torch.optim.Adam([learned], lr=0.03)

    def density(x: Tensor) -> Tensor:
        return -0.5 * ((x - learned[0]) / learned[1].exp()).square().flatten(1).sum(1)

    ends: list[Tensor] = []
    for step in range(200):
        seed = 10 * step
        x0 = MEAN + STD * normal(seed, batch, 1, 1, 1)
        noise = normal(seed + 1, 32, batch, 1, 1, 1)
        real, x = forward_pair(x0, noise[0], noise[1], many, few)
        made = recovery_langevin(density, x, many, few, noise[2:], 0.2)
        optimizer.zero_grad()
        recovery_loss(density(real), density(made)).backward()
        optimizer.step()
        ends.append(learned.detach().clone())
    mean, log_std = torch.stack(ends[-80:]).mean(0).tolist()
    assert mean == pytest.approx(MEAN, abs=0.05)
    assert math.exp(log_std) == pytest.approx(STD, abs=0.05)

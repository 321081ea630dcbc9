"""Learned variances: the optimum of a Gaussian, the loss term by term, and v under guidance."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from latentdiff import guidance
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import (
    Branch,
    Denoiser,
    Estimate,
    bind,
    conditioned_denoiser,
    network_denoiser,
)
from latentdiff.diffusion.likelihood import variational_bound
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian
from latentdiff.diffusion.prediction import Prediction
from latentdiff.diffusion.process import DiscreteVP, NoiseLevel, transition
from latentdiff.diffusion.solver import posterior_std
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.guidance import methods
from latentdiff.learning.denoising import bound_terms, check_learned_variance, noised_batch
from latentdiff.learning.losses import weighted_mse
from latentdiff.solvers import DDPM

VP = DiscreteVP(process.beta_schedule("scaled-linear"))
SPREAD = 0.6  # standard deviation of the data
DATA = Gaussian(torch.tensor([0.2]).double(), torch.tensor([[SPREAD**2]]).double())


def best_v(levels: Timetable) -> dict[float, float]:
    """The v of the true reverse step, which here is Gaussian, at each level but clean data.

    Its variance is the posterior's and what is unknown of x_0: s^2 sigma^2 / (a^2 s^2 + sigma^2).
    """
    best: dict[float, float] = {}
    for before, here, there in zip([None, *levels], levels, levels[1:], strict=False):
        unknown = 1 / (here.alpha**2 / here.sigma**2 + 1 / SPREAD**2)
        small, large = posterior_std(here, there), transition(there, here)[1]
        keep = math.sqrt(there.sigma**2 - small**2) / here.sigma
        std = math.sqrt(small**2 + (there.alpha - keep * here.alpha) ** 2 * unknown)
        if before is not None and there.sigma == 0:
            small = posterior_std(before, here)
        best[here.t] = 2 * math.log(std / small) / math.log(large / small) - 1
    return best


def oracle(levels: Timetable) -> Denoiser:
    """The exact denoiser of DATA, as a network that predicts x_0 and tells the best v."""
    best = best_v(levels)

    def network(x: Tensor, t: Tensor) -> Tensor:
        level = VP.level(t[0].item())
        return torch.cat([DATA(x, level).x0, torch.full_like(x, best[level.t])], 1)

    return network_denoiser(network, VP, "x0")


def test_the_best_variance_makes_the_bound_tight_however_few_the_steps() -> None:
    """8 respaced steps; fixed variances lose much. The rest of the gap is L_T and chance."""
    levels = timetable.create("trailing", VP, 8)
    x = 0.2 + SPREAD * NoiseStreams(3, count=2).draw((1, 200, 200)).double()
    exact = math.log2(SPREAD * math.sqrt(2 * math.pi)) + 0.5 / math.log(2)
    kinds = (None, "fixed-small", "fixed-large")
    learned, small, large = (
        variational_bound(oracle(levels), x, VP, levels, NoiseStreams(1, count=2), variance=kind)
        .total.mean()
        .item()
        for kind in kinds
    )
    assert abs(learned - exact) < 0.02
    assert small > learned + 0.2
    assert large > learned + 0.03, (small, large, learned, exact)
    with pytest.raises(UserError, match="tells it"):
        variational_bound(DATA, x, VP, levels, NoiseStreams(1, count=2), variance="learned-range")


def test_ddpm_with_the_best_variance_ends_with_the_spread_of_the_data() -> None:
    """The fixed variances are too narrow and too wide."""
    levels = timetable.create("trailing", VP, 8)

    def spread(solver: DDPM) -> float:
        x = NoiseStreams(5).draw((1, 200, 200)).double()
        # The last step draws nothing, so the spread is measured at the last noisy level.
        levels_but_one = levels[:-1]
        x = sampling.sample(oracle(levels), solver, levels_but_one, x, noise=NoiseStreams(6))
        last = levels[-2]
        return x.std().item() / math.hypot(last.alpha * SPREAD, last.sigma)

    assert abs(spread(DDPM()) - 1) < 0.01
    assert spread(DDPM("fixed-small")) < 0.97
    assert spread(DDPM("fixed-large")) > 1.03


def test_respaced_times_have_the_betas_of_equation_19() -> None:
    """The bound of a shorter process of those betas, level by level."""
    times = [0, 120, 300, 550, 900]
    kept = VP.alphas_cumprod[times]
    short = DiscreteVP(1 - kept / np.concatenate([[1.0], kept[:-1]]))
    x = NoiseStreams(3, count=2).draw((1, 8, 8)).double()

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.tanh(x), torch.sin(3 * x)], 1)

    totals = [
        variational_bound(
            network_denoiser(network, where, "eps"),
            x,
            where,
            timetable.of_times(where, visited[::-1]),
            NoiseStreams(1, count=2),
        )
        for where, visited in ((VP, times), (short, range(5)))
    ]
    torch.testing.assert_close(totals[0].steps, totals[1].steps)
    torch.testing.assert_close(totals[0].total, totals[1].total)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("last_beta", [0.4, 1.0])
def test_the_loss_is_the_bound_of_every_step(prediction: Prediction, last_beta: float) -> None:
    where = DiscreteVP(np.array([0.01, 0.05, 0.1, 0.2, 0.3, last_beta]))
    x = NoiseStreams(3, count=2).draw((1, 8, 8))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.tanh(x + t[0] / 7), torch.sin(3 * x - t[0])], 1)

    denoise = network_denoiser(network, where, prediction)
    levels = timetable.of_times(where, range(6)[::-1])
    bound = variational_bound(denoise, x, where, levels, NoiseStreams(1, count=2))
    same = NoiseStreams(1, count=2)
    for expected, level in zip([*bound.steps, bound.reconstruction], levels, strict=False):
        noise, t = same.like(x), torch.full((2,), level.t, dtype=torch.float64)
        output = network(level.alpha * x + level.sigma * noise, t.float())
        got = bound_terms(where, prediction, output, x, noise, t)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_loss_moves_v_alone_and_to_the_best() -> None:
    levels = timetable.create("trailing", VP, 1000)
    best = best_v(levels)
    latents = 0.2 + SPREAD * NoiseStreams(3, count=4).draw((1, 300, 300))
    noise = NoiseStreams(4, count=4).draw((1, 300, 300))
    t = torch.tensor([0.0, 1.0, 60.0, 700.0], dtype=torch.float64)
    alpha, sigma = (part.view(-1, 1, 1, 1).float() for part in VP.alpha_sigma(t))
    x0 = [
        DATA((a * x + s * n).double()[None], VP.level(time.item())).x0.float()
        for a, x, s, n, time in zip(alpha, latents, sigma, noise, t, strict=True)
    ]
    mean = torch.cat(x0).requires_grad_()
    optimum = torch.tensor([best[time] for time in t.tolist()])

    def slope(v: Tensor) -> Tensor:
        v = v.view(-1, 1, 1, 1).expand_as(mean).clone().requires_grad_()
        loss = bound_terms(VP, "x0", torch.cat([mean, v], 1), latents, noise, t).sum()
        gradients = torch.autograd.grad(loss, [mean, v], materialize_grads=True)
        assert bool((gradients[0] == 0).all())
        return gradients[1].sum((1, 2, 3))

    shift = torch.full((4,), 0.05)
    assert bool((slope(optimum + shift) > 0).all())
    assert bool((slope(optimum - shift) < 0).all())


def test_the_hybrid_loss_trains_a_network_to_the_best_bound() -> None:
    """A network of 20 steps that can be exact, with a free v at each time, starting at zero."""
    times = np.linspace(10, 999, 20).round().astype(int)
    kept = VP.alphas_cumprod[times]
    where = DiscreteVP(1 - kept / np.concatenate([[1.0], kept[:-1]]))
    slope, shift, v = (torch.zeros(20, 1, 1, 1, requires_grad=True) for _ in range(3))

    def network(x: Tensor, t: Tensor) -> Tensor:
        at = t.long()
        return torch.cat([slope[at] * x + shift[at], v[at].expand_as(x)], 1)

    optimizer = torch.optim.Adam([slope, shift, v], lr=0.05)
    stream, t = NoiseStreams(0, count=40), torch.arange(40, dtype=torch.float64) % 20
    for _ in range(200):
        latents, noise = 0.2 + SPREAD * stream.draw((1, 8, 8)), stream.draw((1, 8, 8))
        batch = noised_batch(where, "x0", latents, noise, t, None)
        output = network(batch.x, batch.t)
        loss = weighted_mse(output[:, :1], batch.target, batch.weights)
        loss = loss + 0.001 * 20 * bound_terms(where, "x0", output, latents, noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    x = 0.2 + SPREAD * NoiseStreams(3, count=2).draw((1, 100, 100))
    levels = timetable.of_times(where, range(20)[::-1])
    exact = math.log2(SPREAD * math.sqrt(2 * math.pi)) + 0.5 / math.log(2)
    with torch.no_grad():
        learned, small, large = (
            variational_bound(
                network_denoiser(network, where, "x0"),
                x,
                where,
                levels,
                NoiseStreams(1, count=2),
                variance=kind,
            ).total.mean()
            for kind in (None, "fixed-small", "fixed-large")
        )
    assert abs(learned - exact) < 0.04
    assert small > learned + 1
    assert large > learned + 0.015


def test_a_bound_that_is_not_defined_is_refused() -> None:
    with pytest.raises(UserError, match="needs a discrete process"):
        check_learned_variance(process.create("flow"), "uniform")
    with pytest.raises(UserError, match="times=uniform"):
        check_learned_variance(VP, "logit-normal")
    check_learned_variance(VP, "uniform")


class Twice:
    """An edit that looks at the estimate, and changes it."""

    def denoiser(self, denoise: Denoiser) -> Denoiser:
        def twice(x: Tensor, level: NoiseLevel) -> Estimate:
            estimate = denoise(x, level)
            return estimate.with_x0(2 * estimate.x0)

        return twice


def answer(x: Tensor, shift: Tensor) -> Tensor:
    """A network's x_0 and v [B, 2C, H, W], both of which the condition [B, 1] tells."""
    shift = shift[:, :, None, None]
    return torch.cat([torch.tanh(x + shift), torch.cos(x) + shift], 1)


def network_with_v(x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int]) -> Tensor:
    assert condition.pooled is not None
    return answer(x, condition.pooled)


def test_under_every_guidance_v_is_the_prompts_own() -> None:
    """And it stays so through further prompts, spoilt attention, thresholds and other edits."""
    x = NoiseStreams(0, count=3).draw((2, 4, 4))
    levels = timetable.create("trailing", VP, 4)
    positive, negative, further = (
        Condition(pooled=torch.tensor(shifts)[:, None])
        for shifts in ((0.7, 0.5, -0.2), (-0.3, 0.0, 0.1), (0.1, -0.6, 0.9))
    )
    own = torch.cos(x) + torch.tensor([0.7, 0.5, -0.2]).view(3, 1, 1, 1)
    base = conditioned_denoiser(network_with_v, VP, "x0")
    bases = [
        base,
        guidance.composed(base, [(further, 0.7)], negative),
        guidance.perturbed(base, 1, scale=2.0),
    ]
    for denoise in bases:
        guided = [
            methods.create(name, denoise, positive, negative, levels, scale=0.6, interval=interval)
            for name in methods.names()
            for interval in ((0.0, math.inf), (1e6, 1e7))
        ]
        guided += [bind(denoise, positive)]
        for guide in guided:
            estimate = guide(x, levels[1])
            torch.testing.assert_close(estimate.variance, own)
            twice = Twice().denoiser(guide)(x, levels[1])
            torch.testing.assert_close(twice.x0, 2 * estimate.x0)
            for edit in (Twice(), guidance.DynamicThresholding(0.9, 0.5)):
                edited = edit.denoiser(guide)(x, levels[1])
                assert (edited.x0 - estimate.x0).abs().max() > 0.01
                torch.testing.assert_close(edited.variance, own)


def test_each_branch_has_its_own_v_and_a_plain_network_none() -> None:
    x = NoiseStreams(0, count=2).draw((2, 4, 4))
    shifts = [torch.tensor([[0.7], [0.5]]), torch.tensor([[-0.3], [0.0]])]
    branches = [Branch("negative", Condition(pooled=shifts[0]))]
    branches += [Branch("positive", Condition(pooled=shifts[1]))]
    level = VP.level(300.0)
    estimates = conditioned_denoiser(network_with_v, VP, "x0")(x, level, branches)
    for estimate, shift in zip(estimates, shifts, strict=True):
        expected, v = answer(x, shift).chunk(2, 1)
        torch.testing.assert_close(estimate.x0, expected)
        torch.testing.assert_close(estimate.variance, v)
    plain = network_denoiser(lambda x, t: torch.tanh(x), VP, "x0")(x, level)
    assert plain.variance is None


def test_ddpm_takes_v_through_an_edit_too() -> None:
    x = NoiseStreams(0).draw((2, 4, 4))
    levels = timetable.create("trailing", VP, 3)
    ends: list[Tensor] = []
    for v, solver in ((-1.0, DDPM("fixed-small")), (1.0, DDPM("fixed-large")), (0.0, DDPM())):

        def network(x: Tensor, t: Tensor, v: float = v) -> Tensor:
            return torch.cat([torch.tanh(x), torch.full_like(x, v)], 1)

        told = network_denoiser(network, VP, "x0")
        edits = [Twice()]
        fixed, learned = (
            sampling.sample(told, s, levels, x, edits=edits, noise=NoiseStreams(1))
            for s in (solver, DDPM("learned-range"))
        )
        torch.testing.assert_close(learned, fixed)
        ends.append(learned)
    assert (ends[0] - ends[1]).abs().max() > 0.01


def test_a_variance_that_no_network_tells_is_refused() -> None:
    denoise = network_denoiser(lambda x, t: torch.tanh(x), VP, "x0")
    levels = timetable.create("trailing", VP, 3)
    x = NoiseStreams(0).draw((2, 4, 4))
    with pytest.raises(UserError, match="needs a network that tells it"):
        sampling.sample(denoise, DDPM("learned-range"), levels, x, noise=NoiseStreams(1))

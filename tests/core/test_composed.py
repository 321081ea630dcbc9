"""Several weighted prompts: the product of Gaussians in closed form, under every guidance."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from latentdiff import guidance, solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import (
    Branch,
    ConditionedDenoiser,
    Denoiser,
    Estimate,
    bind,
    conditioned_denoiser,
)
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.guidance import methods

VP = process.create("vp-scaled-linear")
LEVELS = timetable.create("trailing", VP, 4)
LEVEL = LEVELS[2]
X = NoiseStreams(0, count=3).draw((2, 4, 4)).double()
COVARIANCE = torch.tensor([[1.0, 0.4], [0.4, 0.5]]).double()
NONE, CAT, HAT, RAIN = torch.tensor([[0.0, 0.1], [0.7, -0.4], [-0.3, 0.9], [0.5, 0.5]]).double()
WEIGHTS = (0.7, -0.5)


class Network:
    """Denoiser of data that is Gaussian about the mean in the condition; it counts the batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int]
    ) -> Tensor:
        assert condition.pooled is not None
        assert not perturbed
        self.batches.append(len(x))
        return torch.cat([
            Gaussian(mean, COVARIANCE)(one[None], VP.level(time.item())).x0
            for mean, one, time in zip(condition.pooled, x, t, strict=True)
        ])  # fmt: skip

    def denoiser(self) -> ConditionedDenoiser:
        return conditioned_denoiser(self, VP, "x0")


def about(mean: Tensor) -> Condition:
    return Condition(pooled=mean.expand(3, 2))


def with_further(network: Network) -> ConditionedDenoiser:
    further = list(zip([about(HAT), about(RAIN)], WEIGHTS, strict=True))
    return guidance.composed(network.denoiser(), further, about(NONE))


def product(scale: float) -> Tensor:
    """The mean of p(x) prod_i (p(x | c_i) / p(x))^w_i, all of one covariance."""
    return NONE + scale * ((CAT - NONE) + 0.7 * (HAT - NONE) - 0.5 * (RAIN - NONE))


def test_the_product_of_gaussians_is_exact_in_one_batch() -> None:
    network = Network()
    composed = with_further(network)
    guided = guidance.classifier_free(composed, about(CAT), about(NONE), scale=3.0)
    for level in LEVELS[:-1]:
        expected = Gaussian(product(3.0), COVARIANCE)(X, level).x0
        torch.testing.assert_close(guided(X, level).x0, expected)
    assert network.batches == [12] * 4


def test_without_guidance_the_further_prompts_act_with_their_own_weights() -> None:
    """The negative condition, which nothing else asks there, is asked in the same batch."""
    network = Network()
    alone = bind(with_further(network), about(CAT))
    for level in LEVELS[:-1]:
        expected = Gaussian(product(1.0), COVARIANCE)(X, level).x0
        torch.testing.assert_close(alone(X, level).x0, expected)
    assert network.batches == [12] * 4
    one = guidance.classifier_free(with_further(network), about(CAT), None, scale=1.0)
    assert torch.equal(one(X, LEVEL).x0, alone(X, LEVEL).x0)
    denoise = network.denoiser()
    assert guidance.composed(denoise, [], about(NONE)) is denoise


def positive_alone(
    denoise: ConditionedDenoiser, positive: Condition, negative: Condition, /, *, scale: float
) -> Denoiser:
    """A method of one's own that asks the positive condition and nothing else."""
    branches = [Branch("positive", positive)]
    return lambda x, level: denoise(x, level, branches)[0]


def one_after_the_other(
    denoise: ConditionedDenoiser, positive: Condition, negative: Condition, /, *, scale: float
) -> Denoiser:
    """Classifier-free guidance that asks its conditions in two calls."""
    towards, away = [Branch("positive", positive)], [Branch("negative", negative)]

    def guided(x: Tensor, level: NoiseLevel) -> Estimate:
        plain = denoise(x, level, away)[0].x0
        return Estimate(plain + scale * (denoise(x, level, towards)[0].x0 - plain))

    return guided


def positive_first(
    denoise: ConditionedDenoiser, positive: Condition, negative: Condition, /, *, scale: float
) -> Denoiser:
    """Classifier-free guidance that asks its conditions in another order, and one more."""
    branches = [
        Branch("further", positive),
        Branch("positive", positive),
        Branch("negative", negative),
    ]

    def guided(x: Tensor, level: NoiseLevel) -> Estimate:
        _, towards, away = denoise(x, level, branches)
        return Estimate(away.x0 + scale * (towards.x0 - away.x0))

    return guided


OWN = [positive_alone, one_after_the_other, positive_first]


@pytest.mark.parametrize("name", [*methods.names(), *OWN])
def test_under_every_guidance_it_is_the_composed_estimate_that_is_guided(
    name: str | methods.Method,
) -> None:
    """Inside its interval and outside, where the prompt is without guidance, not alone."""
    whole = about(product(1.0))
    interval = (LEVELS[2].ratio, LEVELS[1].ratio)  # so that only LEVELS[1] is inside
    composed, plain = (
        methods.create(name, denoise, positive, about(NONE), LEVELS, scale=0.8, interval=interval)
        for denoise, positive in (
            (with_further(Network()), about(CAT)),
            (Network().denoiser(), whole),
        )
    )
    for level in LEVELS[:-1]:
        torch.testing.assert_close(composed(X, level).x0, plain(X, level).x0)
    if name is not positive_alone:
        unguided = bind(Network().denoiser(), whole)(X, LEVELS[1]).x0
        assert (plain(X, LEVELS[1]).x0 - unguided).abs().max() > 1e-2


def test_a_run_without_guidance_ends_at_the_mean_of_the_product() -> None:
    """Whole runs of narrow data: DDIM comes to the composed mean, not to the prompt's."""
    levels = timetable.create("trailing", VP, 4)
    narrow = torch.tensor([[1e-6, 0.0], [0.0, 1e-6]]).double()

    def network(x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int]) -> Tensor:
        assert condition.pooled is not None
        return torch.cat([
            Gaussian(mean, narrow)(one[None], VP.level(time.item())).x0
            for mean, one, time in zip(condition.pooled, x, t, strict=True)
        ])  # fmt: skip

    further = list(zip([about(HAT), about(RAIN)], WEIGHTS, strict=True))
    composed = guidance.composed(conditioned_denoiser(network, VP, "x0"), further, about(NONE))
    noise = NoiseStreams(0, count=3)
    end = sampling.sample(
        bind(composed, about(CAT)), solvers.create("ddim"), levels, X, noise=noise
    )
    assert (end - product(1.0)[:, None, None]).abs().max() < 0.01
    assert (product(1.0) - CAT).abs().max() > 0.3


def test_with_image_guidance_the_negative_that_sees_the_picture_is_the_base() -> None:
    """Three conditions, and what the positive one has beside it is the further prompts', too."""

    def network(x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int]) -> Tensor:
        assert condition.pooled is not None
        assert condition.beside is not None
        return torch.tanh(x) + (condition.pooled + condition.beside[:, :, 0, 0])[:, :, None, None]

    def seeing(mean: Tensor, beside: float) -> Condition:
        return Condition(pooled=mean.expand(3, 2), beside=torch.full((3, 1, 4, 4), beside).double())

    denoise = conditioned_denoiser(network, VP, "x0")
    guided = guidance.classifier_free(
        guidance.composed(denoise, [(seeing(HAT, 2.0), 0.5)], seeing(NONE, 2.0)),
        seeing(CAT, 2.0),
        seeing(NONE, 2.0),
        scale=3.0,
        blind=seeing(NONE, 0.0),
        image_scale=1.5,
    )
    mean = NONE + 2 + 3 * (CAT - NONE + 0.5 * (HAT - NONE)) + 0.5 * 2
    torch.testing.assert_close(guided(X, LEVEL).x0, torch.tanh(X) + mean[:, None, None])


def test_what_the_guidance_asks_without_a_positive_condition_stays_the_networks_own() -> None:
    network = Network()
    asked = [Branch("negative", about(NONE)), Branch("further", about(RAIN))]
    got = with_further(network)(X, LEVEL, asked)
    for estimate, mean in zip(got, (NONE, RAIN), strict=True):
        torch.testing.assert_close(estimate.x0, Gaussian(mean, COVARIANCE)(X, LEVEL).x0)
    assert network.batches == [6]


def test_pure_noise_has_a_composed_estimate_too() -> None:
    """At alpha = 0 the estimate is the composed mean itself."""
    level = process.create("flow").level(1000.0)
    assert math.isinf(level.ratio)

    def network(x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int]) -> Tensor:
        assert condition.pooled is not None
        return condition.pooled[:, :, None, None].expand_as(x)

    denoise = conditioned_denoiser(network, process.create("flow"), "x0")
    further = list(zip([about(HAT), about(RAIN)], WEIGHTS, strict=True))
    composed = guidance.composed(denoise, further, about(NONE))
    got = bind(composed, about(CAT))(X, level).x0
    torch.testing.assert_close(got, product(1.0)[:, None, None].expand_as(X))

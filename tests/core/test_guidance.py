"""Classifier-free guidance: off at 1, one batch, its formula, rescale and interval."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from latentdiff import solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import Branch, Denoiser, Estimate, bind, conditioned_denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError
from latentdiff.guidance import classifier_free

FLOW = process.Flow()
LEVEL = FLOW.level(0.5)
X = NoiseStreams(0, count=3).draw((2, 4, 4))
CATS = Condition(states=torch.full((3, 5, 2), 0.7))
DOGS = Condition(states=torch.full((3, 5, 2), -0.3))


class Network:
    """x0 = tanh(x + the mean of its text states); it remembers the batches it was asked for."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int]
    ) -> Tensor:
        assert condition.states is not None
        assert len(x) == len(t) == len(condition.states)
        self.batches.append(len(x))
        return torch.tanh(x + condition.states.mean((1, 2))[:, None, None, None])


@pytest.fixture
def network() -> Network:
    return Network()


def expected(condition: Condition) -> Tensor:
    assert condition.states is not None
    return torch.tanh(X + condition.states.mean())


def test_scale_is_the_formula_in_one_batch(network: Network) -> None:
    denoise = conditioned_denoiser(network, FLOW, "x0")
    x0 = classifier_free(denoise, CATS, DOGS, scale=3.0)(X, LEVEL).x0
    torch.testing.assert_close(x0, expected(DOGS) + 3 * (expected(CATS) - expected(DOGS)))
    assert network.batches == [6]


@pytest.mark.parametrize("negative", [DOGS, None])
def test_scale_1_is_unguided_and_costs_nothing(
    network: Network, negative: Condition | None
) -> None:
    denoise = conditioned_denoiser(network, FLOW, "v")
    guided = classifier_free(denoise, CATS, negative, scale=1.0, rescale=0.7)
    alone = [Branch("positive", CATS)]
    unguided: Denoiser = lambda x, level: denoise(x, level, alone)[0]  # noqa: E731
    levels = timetable.create("trailing", FLOW, 4)
    ends = [
        sampling.sample(each, solvers.create("dpmpp-2m"), levels, X, noise=NoiseStreams(0, count=3))
        for each in (guided, unguided, bind(denoise, CATS))
    ]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    assert set(network.batches) == {3}


def test_guiding_x0_is_guiding_eps(network: Network) -> None:
    """One level, one affine map: the same x_0 comes of guiding the network's own output."""
    denoise = conditioned_denoiser(network, FLOW, "eps")
    x0 = classifier_free(denoise, CATS, DOGS, scale=4.0)(X, LEVEL).x0
    eps = expected(DOGS) + 4 * (expected(CATS) - expected(DOGS))
    torch.testing.assert_close(x0, (X - LEVEL.sigma * eps) / LEVEL.alpha)


def test_rescale_restores_each_pictures_contrast(network: Network) -> None:
    denoise = conditioned_denoiser(network, FLOW, "x0")
    plain, half, full = (
        classifier_free(denoise, CATS, DOGS, scale=6.0, rescale=phi)(X, LEVEL).x0
        for phi in (0.0, 0.5, 1.0)
    )
    std = expected(CATS).std((1, 2, 3))
    torch.testing.assert_close(full.std((1, 2, 3)), std)
    torch.testing.assert_close(half, 0.5 * plain + 0.5 * full)
    assert (plain.std((1, 2, 3)) / std - 1).abs().min() > 0.05

    def nothing(x: Tensor, level: NoiseLevel, branches: Sequence[Branch]) -> tuple[Estimate, ...]:
        return tuple(Estimate(0 * x) for _ in branches)

    flat = classifier_free(nothing, CATS, DOGS, scale=6.0, rescale=1.0)
    assert torch.equal(flat(X, LEVEL).x0, 0 * X)


def test_interval_is_in_sigma_over_alpha(network: Network) -> None:
    denoise = conditioned_denoiser(network, FLOW, "x0")
    guided = classifier_free(denoise, CATS, DOGS, scale=3.0, interval=(0.5, 2.0))
    for ratio in (2.1, 1.9, 0.6, 0.4):
        guided(X, FLOW.level_of_ratio(ratio))
    guided(X, FLOW.level(1.0))
    assert network.batches == [3, 6, 6, 3, 3]
    everywhere = classifier_free(denoise, CATS, DOGS, scale=3.0)
    everywhere(X, FLOW.level(1.0))
    assert network.batches[-1] == 6


def test_impossible_guidance_is_refused(network: Network) -> None:
    denoise = conditioned_denoiser(network, FLOW, "x0")
    with pytest.raises(UserError, match="needs a negative"):
        classifier_free(denoise, CATS, None, scale=2.0)
    with pytest.raises(UserError, match="condition without it"):
        classifier_free(denoise, CATS, DOGS, scale=2.0, image_scale=1.5)
    with pytest.raises(UserError, match="between 0 and 1"):
        classifier_free(denoise, CATS, DOGS, scale=2.0, rescale=1.5)
    with pytest.raises(UserError, match="interval"):
        classifier_free(denoise, CATS, DOGS, scale=2.0, interval=(2.0, 1.0))
    with pytest.raises(UserError, match="finite"):
        classifier_free(denoise, CATS, DOGS, scale=math.nan)
    other = Condition(states=torch.zeros(3, 5, 3))
    with pytest.raises(UserError, match="same fields and shapes"):
        classifier_free(denoise, CATS, other, scale=2.0)(X, LEVEL)

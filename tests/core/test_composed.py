"""Several weighted prompts: the product of Gaussians in closed form, under every guidance."""

import pytest
import torch
from torch import Tensor

from latentdiff import guidance
from latentdiff.diffusion import process, timetable
from latentdiff.diffusion.denoiser import Condition, bind, mark
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import Gaussian
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError
from latentdiff.guidance import named

VP = process.create("vp-scaled-linear")
LEVELS = timetable.create("trailing", VP, 4)
LEVEL = LEVELS[2]
X = NoiseStreams(0, count=3).draw((2, 4, 4)).double()
COVARIANCE = torch.tensor([[1.0, 0.4], [0.4, 0.5]]).double()
NONE, CAT, HAT, RAIN = torch.tensor([[0.0, 0.1], [0.7, -0.4], [-0.3, 0.9], [0.5, 0.5]]).double()


class Denoise:
    """Of data that is Gaussian about the mean which the condition tells; it counts the batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        self.batches.append(len(x))
        return torch.cat([
            Gaussian(mean, COVARIANCE)(one[None], level)
            for mean, one in zip(condition["mean"], x, strict=True)
        ])  # fmt: skip


def about(mean: Tensor, positive: bool = False) -> Condition:
    return mark({"mean": mean.expand(3, 2)}, positive)


def test_the_product_of_gaussians_is_exact_in_one_batch() -> None:
    """p(x) prod_i (p(x | c_i) / p(x))^w_i, of one covariance, has the mean that the weights say."""
    denoise = Denoise()
    further = [(about(HAT), 0.7), (about(RAIN), -0.5)]
    together = guidance.composed(denoise, further)
    guided = guidance.classifier_free(together, about(CAT, True), about(NONE), scale=3.0)
    mean = NONE + 3 * ((CAT - NONE) + 0.7 * (HAT - NONE) - 0.5 * (RAIN - NONE))
    for level in LEVELS[:-1]:
        torch.testing.assert_close(guided(X, level), Gaussian(mean, COVARIANCE)(X, level))
    assert denoise.batches == [12] * 4
    same = guidance.weighted(
        Denoise(), [about(CAT), about(HAT), about(RAIN)], [3.0, 2.1, -1.5], about(NONE)
    )
    torch.testing.assert_close(guided(X, LEVEL), same(X, LEVEL))


@pytest.mark.parametrize("name", named.names())
def test_under_every_guidance_it_is_the_composed_estimate_that_is_guided(name: str) -> None:
    composed = guidance.composed(Denoise(), [(about(HAT), 0.7)])
    whole = about(CAT + 0.7 * (HAT - NONE), True)
    got, expected = (
        named.create(name, denoise, positive, about(NONE), LEVELS, scale=0.8)(X, LEVEL)
        for denoise, positive in ((composed, about(CAT, True)), (Denoise(), whole))
    )
    torch.testing.assert_close(got, expected)


def test_where_nothing_guides_the_prompt_is_alone() -> None:
    denoise = Denoise()
    composed = guidance.composed(denoise, [(about(HAT), 0.7)])
    alone = bind(composed, about(CAT, True))(X, LEVEL)
    torch.testing.assert_close(alone, Gaussian(CAT, COVARIANCE)(X, LEVEL))
    assert denoise.batches == [3]
    assert guidance.composed(denoise, []) is denoise


def test_with_image_guidance_the_negative_that_sees_the_picture_is_the_base() -> None:
    """Three conditions, and what the positive one has beside it is the further prompts', too."""

    def denoise(x: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        return torch.tanh(x) + (condition["mean"] + condition["beside"])[:, :, None, None]

    def seeing(mean: Tensor, beside: float, positive: bool = False) -> Condition:
        return {**about(mean, positive), "beside": torch.full((3, 1), beside).double()}

    guided = guidance.classifier_free(
        guidance.composed(denoise, [(about(HAT), 0.5)]),
        seeing(CAT, 2.0, True),
        seeing(NONE, 2.0),
        scale=3.0,
        blind=seeing(NONE, 0.0),
        image_scale=1.5,
    )
    mean = NONE + 2 + 3 * (CAT - NONE + 0.5 * (HAT - NONE)) + 0.5 * 2
    torch.testing.assert_close(guided(X, LEVEL), torch.tanh(X) + mean[:, None, None])


def test_a_guidance_that_asks_one_by_one_is_refused_instead_of_nan() -> None:
    for denoise in (
        guidance.composed(Denoise(), [(about(HAT), 0.7)]),
        guidance.perturbed(Denoise(), 1, 3, scale=3.0),
    ):
        with pytest.raises(UserError, match="together"):
            denoise(X, LEVEL, about(NONE))

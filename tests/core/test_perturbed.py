"""Perturbed guidance under every other guidance: the term that arrives, in one batch."""

import math

import pytest
import torch
from torch import Tensor

from latentdiff import guidance
from latentdiff.diffusion import process, timetable
from latentdiff.diffusion.denoiser import Condition, ConditionedDenoiser, Denoiser, bind, mark
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError
from latentdiff.guidance.perturbed_attention import SPOILT

FLOW = process.Flow()
LEVEL = FLOW.level(0.5)
LEVELS = timetable.create("trailing", FLOW, 4)
X = NoiseStreams(0, count=3).draw((2, 4, 4)).double()
SCALE = 2.5


def condition(shift: float, positive: bool) -> Condition:
    return mark({"states": torch.full((3, 1, 1), shift)}, positive)


CAT, DOG, NONE = condition(0.7, True), condition(-0.3, True), condition(0.0, False)


class Denoise:
    """x_0 = tanh(x + shift), of spoilt rows tanh(x / (1 + number) + shift)."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        self.batches.append(len(x))
        spoilt = condition.get(SPOILT, torch.zeros(len(x)))[:, None, None, None]
        return torch.tanh(x / (1 + spoilt) + condition["states"][:, :, :, None])


def x0(shift: float, number: int = 0) -> Tensor:
    return torch.tanh(X / (1 + number) + torch.tensor(shift))


def under(name: str, denoise: ConditionedDenoiser) -> tuple[Denoiser, Tensor]:
    """A guidance, and the mean of what its positive conditions lose when they are spoilt."""
    cat, dog = x0(0.7) - x0(0.7, 1), x0(-0.3) - x0(-0.3, 1)
    return {
        "off": (bind(denoise, CAT), cat),
        "cfg": (guidance.classifier_free(denoise, CAT, NONE, scale=4.0), cat),
        "cfg++": (guidance.cfg_plus_plus(denoise, CAT, NONE, LEVELS, strength=0.6), cat),
        "apg": (guidance.projected(denoise, CAT, NONE, scale=4.0, parallel=1.0), cat),
        "several": (guidance.weighted(denoise, [CAT, DOG], [3.0, -1.0], NONE), (cat + dog) / 2),
    }[name]


@pytest.mark.parametrize("name", ["off", "cfg", "cfg++", "apg", "several"])
def test_the_term_arrives_under_every_guidance_in_one_batch(name: str) -> None:
    denoise = Denoise()
    plain, away = under(name, denoise)
    without = plain(X, LEVEL)
    rows = denoise.batches.pop()
    both, _ = under(name, guidance.perturbed(denoise, 1, 3, scale=SCALE))
    torch.testing.assert_close(both(X, LEVEL), without + SCALE * away)
    assert denoise.batches == [rows + (6 if name == "several" else 3)]


def test_two_perturbations_add_up() -> None:
    denoise = Denoise()
    first = guidance.perturbed(denoise, 1, 3, scale=SCALE)
    second = guidance.perturbed(first, 2, 3, scale=-0.5)
    got = guidance.classifier_free(second, CAT, NONE, scale=4.0)(X, LEVEL)
    expected = x0(0.0) + 4 * (x0(0.7) - x0(0.0))
    expected += SCALE * (x0(0.7) - x0(0.7, 1)) - 0.5 * (x0(0.7) - x0(0.7, 2))
    torch.testing.assert_close(got, expected)
    assert denoise.batches == [12]


def test_off_and_outside_its_interval_nothing_is_spoilt() -> None:
    denoise = Denoise()
    off = guidance.perturbed(denoise, 1, 3, scale=0.0)
    above = guidance.perturbed(denoise, 1, 3, scale=SCALE, interval=(LEVEL.ratio, math.inf))
    for idle in (off, above):
        assert torch.equal(idle(X, LEVEL, CAT), x0(0.7))
    assert denoise.batches == [3, 3]
    upto = guidance.perturbed(denoise, 1, 3, scale=SCALE, interval=(0, LEVEL.ratio))
    assert not torch.equal(upto(X, LEVEL, CAT), x0(0.7))
    for scale, interval in ((math.nan, (0.0, 1.0)), (1.0, (2.0, 1.0))):
        with pytest.raises(UserError, match="a finite scale and an interval"):
            guidance.perturbed(denoise, 1, 3, scale=scale, interval=interval)

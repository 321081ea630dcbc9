"""Perturbed guidance under every other guidance: the term that arrives, in one batch."""

import math

import pytest
import torch
from told import Told, one_by_one, telling, told
from torch import Tensor

from latentdiff import PAG, SEG, guidance
from latentdiff.diffusion import process, timetable
from latentdiff.diffusion.denoiser import Branch, ConditionedDenoiser, Denoiser, bind
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.errors import UserError

FLOW = process.Flow()
LEVEL = FLOW.level(0.5)
LEVELS = timetable.create("trailing", FLOW, 4)
X = NoiseStreams(0, count=3).draw((2, 4, 4)).double()
SCALE = 2.5
SHIFTS = {"cat": (0.7, 0.2, -0.4), "dog": (-0.3, 0.5, 0.1), "none": (0.0, 0.05, -0.1)}
CAT, DOG, NONE = (telling(*SHIFTS[name]) for name in ("cat", "dog", "none"))


def x0(name: str, number: int = 0) -> Tensor:
    return told(X, torch.tensor(SHIFTS[name], dtype=torch.float64), number)


def lost(number: int) -> Tensor:
    """The part of the positive estimate that is lost when it is spoilt."""
    return x0("cat") - x0("cat", number)


def under(name: str, denoise: ConditionedDenoiser) -> Denoiser:
    return {
        "off": lambda: bind(denoise, CAT),
        "cfg": lambda: guidance.classifier_free(denoise, CAT, NONE, scale=4.0),
        "cfg++": lambda: guidance.cfg_plus_plus(denoise, CAT, NONE, LEVELS, strength=0.6),
        "apg": lambda: guidance.projected(denoise, CAT, NONE, scale=4.0, parallel=1.0),
        "also": lambda: guidance.classifier_free(
            guidance.composed(denoise, [(DOG, -0.4)], NONE), CAT, NONE, scale=4.0
        ),
        "also, off": lambda: bind(guidance.composed(denoise, [(DOG, -0.4)], NONE), CAT),
    }[name]()


@pytest.mark.parametrize("name", ["off", "cfg", "cfg++", "apg", "also", "also, off"])
def test_the_term_arrives_under_every_guidance_in_one_batch(name: str) -> None:
    network = Told()
    denoise = network.denoiser(FLOW)
    without = under(name, denoise)(X, LEVEL).x0
    rows = network.batches.pop()
    both = under(name, guidance.perturbed(denoise, 1, scale=SCALE))
    torch.testing.assert_close(both(X, LEVEL).x0, without + SCALE * lost(1))
    assert network.batches == [rows + 3]


def test_two_perturbations_add_up() -> None:
    network = Told()
    first = guidance.perturbed(network.denoiser(FLOW), 1, scale=SCALE)
    second = guidance.perturbed(first, 2, scale=-0.5)
    got = guidance.classifier_free(second, CAT, NONE, scale=4.0)(X, LEVEL).x0
    expected = x0("none") + 4 * (x0("cat") - x0("none"))
    expected += SCALE * lost(1) - 0.5 * lost(2)
    torch.testing.assert_close(got, expected)
    assert network.batches == [12]


@pytest.mark.parametrize("edit", [PAG(SCALE), SEG(SCALE)])
def test_the_edits_are_the_function(edit: PAG | SEG) -> None:
    """With the number that the pipeline gives the edit, and its scale and interval."""
    denoise = Told().denoiser(FLOW)
    got = bind(edit.branches(denoise, 2), CAT)(X, LEVEL).x0
    torch.testing.assert_close(got, x0("cat") + SCALE * lost(2))
    outside = type(edit)(SCALE, interval=(LEVEL.ratio, math.inf))
    assert torch.equal(bind(outside.branches(denoise, 2), CAT)(X, LEVEL).x0, x0("cat"))


def test_off_and_outside_its_interval_nothing_is_spoilt() -> None:
    network = Told()
    denoise, alone = network.denoiser(FLOW), [Branch("positive", CAT)]
    off = guidance.perturbed(denoise, 1, scale=0.0)
    above = guidance.perturbed(denoise, 1, scale=SCALE, interval=(LEVEL.ratio, math.inf))
    for idle in (off, above):
        assert torch.equal(idle(X, LEVEL, alone)[0].x0, x0("cat"))
    assert network.batches == [3, 3]
    upto = guidance.perturbed(denoise, 1, scale=SCALE, interval=(0, LEVEL.ratio))
    torch.testing.assert_close(upto(X, LEVEL, alone)[0].x0, x0("cat") + SCALE * lost(1))
    with pytest.raises(UserError, match="scale: must be a finite number"):
        guidance.perturbed(denoise, 1, scale=math.nan)
    with pytest.raises(UserError, match="interval is two numbers"):
        guidance.perturbed(denoise, 1, scale=1.0, interval=(2.0, 1.0))


def test_a_guidance_that_asks_one_by_one_is_refused_instead_of_wrong() -> None:
    """A call with the negative condition alone has nothing to spoil."""
    spoilt = guidance.perturbed(Told().denoiser(FLOW), 1, scale=SCALE)
    with pytest.raises(UserError, match="in one call"):
        spoilt(X, LEVEL, [Branch("negative", NONE)])
    guided = guidance.classifier_free(one_by_one(spoilt), CAT, NONE, scale=4.0)
    with pytest.raises(UserError, match="in one call"):
        guided(X, LEVEL)

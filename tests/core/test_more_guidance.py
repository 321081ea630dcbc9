"""The other guidances: each against its formula, off where it says so, one batch where it can."""

import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from torch import Tensor

from latentdiff import guidance, solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.denoiser import Condition
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import mixture
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError
from latentdiff.guidance import named

FLOW = process.Flow()
LEVEL = FLOW.level(0.5)
X = NoiseStreams(0, count=3).draw((2, 4, 4)).double()
CAT, DOG, NONE = ({"shift": torch.full((3,), value)} for value in (0.7, -0.3, 0.0))


class Denoise:
    """x_0 = tanh(x + shift), counting the batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        self.batches.append(len(x))
        return torch.tanh(x + condition["shift"][:, None, None, None])


@pytest.fixture
def denoise() -> Denoise:
    return Denoise()


def x0(shift: float, x: Tensor = X) -> Tensor:
    return torch.tanh(x + torch.tensor(shift))


def test_several_prompts_add_up_in_one_batch(denoise: Denoise) -> None:
    guided = guidance.weighted(denoise, [CAT, DOG], [3.0, -1.0], NONE)(X, LEVEL)
    expected = x0(0) + 3 * (x0(0.7) - x0(0)) - (x0(-0.3) - x0(0))
    torch.testing.assert_close(guided, expected)
    assert denoise.batches == [9]
    one = guidance.weighted(denoise, [CAT], [4.0], NONE)(X, LEVEL)
    torch.testing.assert_close(
        one, guidance.classifier_free(denoise, CAT, NONE, scale=4.0)(X, LEVEL)
    )


def test_projection(denoise: Denoise) -> None:
    """Keeping the parallel part is classifier-free guidance; without it x_0's part is untouched."""
    kept = guidance.projected(denoise, CAT, DOG, scale=5.0, parallel=1.0)(X, LEVEL)
    torch.testing.assert_close(
        kept, guidance.classifier_free(denoise, CAT, DOG, scale=5.0)(X, LEVEL)
    )
    added = guidance.projected(denoise, CAT, DOG, scale=5.0)(X, LEVEL) - x0(0.7)
    assert (added * x0(0.7)).sum((1, 2, 3)).abs().max() < 1e-9
    assert added.abs().max() > 0.1
    short = guidance.projected(denoise, CAT, DOG, scale=5.0, parallel=1.0, largest=0.01)
    norms = torch.linalg.vector_norm(short(X, LEVEL) - x0(0.7), dim=(1, 2, 3))
    torch.testing.assert_close(norms, torch.full_like(norms, 0.04))
    denoise.batches.clear()
    assert torch.equal(guidance.projected(denoise, CAT, DOG, scale=1.0)(X, LEVEL), x0(0.7))
    assert denoise.batches == [3]


def test_momentum_is_diffusers_and_starts_anew_after_a_jump(denoise: Denoise) -> None:
    levels = timetable.create("trailing", process.create("vp-scaled-linear"), 6)
    shared = {"scale": 5.0, "parallel": 0.3, "largest": 4.0}
    ours = guidance.projected(denoise, CAT, DOG, momentum=-0.6, **shared)
    for _ in range(2):  # the second round begins with a jump back to the noise
        buffer = MomentumBuffer(-0.6)
        for level in levels[:-1]:
            x = X * (1 + level.sigma)
            expected = normalized_guidance(
                x0(0.7, x),
                x0(-0.3, x),
                4.0,  # in this formulation, the paper's, 0 is off
                buffer,
                eta=0.3,
                norm_threshold=4.0,
                use_original_formulation=True,
            )
            for _ in range(2):  # a corrector asks twice
                torch.testing.assert_close(ours(x, level), expected, atol=1e-9, rtol=1e-9)
    without = guidance.projected(denoise, CAT, DOG, **shared)
    assert (ours(X, levels[-1]) - without(X, levels[-1])).abs().max() > 1e-3
    assert torch.equal(ours(X, levels[0]), without(X, levels[0]))
    with pytest.raises(UserError, match="between -1 and 1"):
        guidance.projected(denoise, CAT, DOG, scale=2.0, momentum=1.0)


@pytest.mark.parametrize("kind", ["flow", "vp-linear-zsnr", "ve"])
def test_cfg_plus_plus_is_its_algorithm(denoise: Denoise, kind: str) -> None:
    """alpha' x_0 guided + sigma' eps of the negative condition, step by step, by plain DDIM."""
    where = process.create(kind)
    levels = timetable.create("trailing", where, 5)
    trail: list[Tensor] = []
    sampling.sample(
        guidance.cfg_plus_plus(denoise, CAT, NONE, levels, strength=0.6),
        solvers.create("ddim"),
        levels,
        X,
        noise=NoiseStreams(0, count=3),
        callback=lambda index, level, x: trail.append(x),
    )
    x = X
    for here, there, got in zip(levels, levels[1:], trail, strict=False):
        plain = x0(0, x)
        eps = (x - here.alpha * plain) / here.sigma
        x = there.alpha * (plain + 0.6 * (x0(0.7, x) - plain)) + there.sigma * eps
        torch.testing.assert_close(got, x)


def test_a_weaker_model() -> None:
    strong, weak = (lambda x, level, s=s: torch.tanh(x + s) for s in (0.5, 0.2))
    guided = guidance.from_weaker(strong, weak, scale=2.0)(X, LEVEL)
    torch.testing.assert_close(guided, 2 * x0(0.5) - x0(0.2))
    assert guidance.from_weaker(strong, weak, scale=1.0) is strong


def test_thresholds_are_each_pictures_own() -> None:
    x = X / X.abs().amax((1, 2, 3), keepdim=True) * torch.tensor([0.5, 3.0, 9.0]).view(3, 1, 1, 1)
    clipped = guidance.thresholded(lambda x, level: x, quantile=1.0)(x, LEVEL)
    torch.testing.assert_close(clipped[0], x[0])
    torch.testing.assert_close(clipped[1:].abs().amax((1, 2, 3)), torch.ones(2).double())
    half = guidance.thresholded(lambda x, level: x, quantile=0.5, at_least=0.1)(x, LEVEL)
    at_the_bound = (half.abs() - 0.1).abs() < 1e-12
    assert at_the_bound.double().flatten(1).mean(1).min() >= 0.5


def test_a_classifier_turns_the_mixture_into_its_component() -> None:
    """With the exact p(component | x_t), classifier guidance is that component's own denoiser."""
    both = mixture([1, 1], [[-1.0, 0.0], [1.0, 0.5]], [0.3, 0.5])
    first = mixture([1], [[-1.0, 0.0]], [0.3])

    def log_probability(x: Tensor, level: NoiseLevel) -> Tensor:
        spread = level.alpha**2 * torch.tensor([0.09, 0.25]).double() + level.sigma**2
        away = (x[:, None] - level.alpha * both.means[:, :, None, None]).square().sum(2)
        exponent = -0.5 * away / spread[:, None, None] - spread.log()[:, None, None]
        return exponent.log_softmax(1)[:, 0].sum((1, 2))

    guided = guidance.from_classifier(both, log_probability, strength=1.0)
    with torch.no_grad():
        torch.testing.assert_close(guided(X, LEVEL), first(X, LEVEL))
    assert guidance.from_classifier(both, log_probability, strength=0.0) is both
    pure = FLOW.level(1.0)
    torch.testing.assert_close(guided(X, pure), both(X, pure))


def test_by_name(denoise: Denoise) -> None:
    levels = timetable.create("trailing", FLOW, 5)
    pairs = {
        "cfg": guidance.classifier_free(denoise, CAT, DOG, scale=0.6),
        "apg": guidance.projected(denoise, CAT, DOG, scale=0.6),
        "cfg++": guidance.cfg_plus_plus(denoise, CAT, DOG, levels, strength=0.6),
    }
    assert named.names() == list(pairs)
    for name, expected in pairs.items():
        got = named.create(name, denoise, CAT, DOG, levels, scale=0.6)
        assert torch.equal(got(X, levels[1]), expected(X, levels[1]))
        off = named.create(name, denoise, CAT, None, levels, scale=1.0)
        assert torch.equal(off(X, LEVEL), x0(0.7))
    with pytest.raises(UserError, match="takes no rescale"):
        named.create("apg", denoise, CAT, DOG, levels, scale=2.0, rescale=0.5)
    with pytest.raises(UserError, match="did you mean 'cfg"):
        named.create("cfgg", denoise, CAT, DOG, levels, scale=2.0)
    with pytest.raises(UserError, match="needs a negative"):
        named.create("apg", denoise, CAT, None, levels, scale=2.0)


def test_impossible_guidance_is_refused(denoise: Denoise) -> None:
    with pytest.raises(UserError, match="1 weights were given for 2"):
        guidance.weighted(denoise, [CAT, DOG], [1.0], NONE)
    with pytest.raises(UserError, match="finite"):
        guidance.weighted(denoise, [CAT], [math.nan], NONE)
    with pytest.raises(UserError, match="norm above 0"):
        guidance.projected(denoise, CAT, DOG, scale=2.0, largest=0.0)
    with pytest.raises(UserError, match="between 0 and 1"):
        guidance.cfg_plus_plus(denoise, CAT, DOG, [LEVEL, FLOW.data_level()], strength=2.0)
    with pytest.raises(UserError, match="timetable"):
        guidance.cfg_plus_plus(denoise, CAT, DOG, [LEVEL], strength=0.5)
    with pytest.raises(UserError, match="quantile"):
        guidance.thresholded(lambda x, level: x, quantile=0.0)

"""The other guidances: each against its formula, off where it says so, one batch where it can."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from told import Told, one_by_one, telling, told
from torch import Tensor

from latentdiff import guidance, solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import Branch, ConditionedDenoiser, Denoiser, Estimate, bind
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import mixture
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.errors import UserError
from latentdiff.guidance import methods

FLOW = process.Flow()
LEVEL = FLOW.level(0.5)
X = NoiseStreams(0, count=3).draw((2, 4, 4)).double()
SHIFTS = {"cat": (0.7, 0.2, -0.4), "dog": (-0.3, 0.5, 0.1), "none": (0.0, 0.05, -0.1)}
CAT, DOG, NONE = (telling(*SHIFTS[name]) for name in ("cat", "dog", "none"))


@pytest.fixture
def network() -> Told:
    return Told()


def x0(name: str, x: Tensor = X) -> Tensor:
    return told(x, torch.tensor(SHIFTS[name], dtype=torch.float64))


def test_projection(network: Told) -> None:
    """Keeping the parallel part is classifier-free guidance; without it x_0's part is untouched."""
    denoise = network.denoiser(FLOW)
    kept = guidance.projected(denoise, CAT, DOG, scale=5.0, parallel=1.0)(X, LEVEL)
    cfg = guidance.classifier_free(denoise, CAT, DOG, scale=5.0)(X, LEVEL)
    torch.testing.assert_close(kept.x0, cfg.x0)
    added = guidance.projected(denoise, CAT, DOG, scale=5.0)(X, LEVEL).x0 - x0("cat")
    assert (added * x0("cat")).sum((1, 2, 3)).abs().max() < 1e-9
    assert added.abs().max() > 0.1
    short = guidance.projected(denoise, CAT, DOG, scale=5.0, parallel=1.0, largest=0.01)
    norms = torch.linalg.vector_norm(short(X, LEVEL).x0 - x0("cat"), dim=(1, 2, 3))
    torch.testing.assert_close(norms, torch.full_like(norms, 0.04))
    assert network.batches == [6] * 4
    network.batches.clear()
    off = guidance.projected(denoise, CAT, DOG, scale=1.0)(X, LEVEL)
    assert torch.equal(off.x0, x0("cat"))
    assert network.batches == [3]


def test_momentum_is_diffusers_and_starts_anew_after_a_jump(network: Told) -> None:
    levels = timetable.create("trailing", process.create("vp-scaled-linear"), 6)
    denoise = network.denoiser(process.create("vp-scaled-linear"))
    shared = {"scale": 5.0, "parallel": 0.3, "largest": 4.0}
    ours = guidance.projected(denoise, CAT, DOG, momentum=-0.6, **shared)
    for _ in range(2):  # the second round begins with a jump back to the noise
        buffer = MomentumBuffer(-0.6)
        for level in levels[:-1]:
            x = X * (1 + level.sigma)
            expected = normalized_guidance(
                x0("cat", x),
                x0("dog", x),
                4.0,  # in this formulation, the paper's, 0 is off
                buffer,
                eta=0.3,
                norm_threshold=4.0,
                use_original_formulation=True,
            )
            for _ in range(2):  # a corrector asks twice
                torch.testing.assert_close(ours(x, level).x0, expected, atol=1e-9, rtol=1e-9)
    without = guidance.projected(denoise, CAT, DOG, **shared)
    assert (ours(X, levels[-1]).x0 - without(X, levels[-1]).x0).abs().max() > 1e-3
    assert torch.equal(ours(X, levels[0]).x0, without(X, levels[0]).x0)
    with pytest.raises(UserError, match="between -1 and 1"):
        guidance.projected(denoise, CAT, DOG, scale=2.0, momentum=1.0)


@pytest.mark.parametrize("kind", ["flow", "vp-linear-zsnr", "ve"])
def test_cfg_plus_plus_is_its_algorithm(network: Told, kind: str) -> None:
    """alpha' x_0 guided + sigma' eps of the negative condition, step by step, by plain DDIM."""
    where = process.create(kind)
    levels = timetable.create("trailing", where, 5)
    trail: list[Tensor] = []
    sampling.sample(
        guidance.cfg_plus_plus(network.denoiser(where), CAT, NONE, levels, strength=0.6),
        solvers.create("ddim"),
        levels,
        X,
        noise=NoiseStreams(0, count=3),
        callback=lambda index, level, x: trail.append(x),
    )
    assert network.batches == [6] * 5
    x = X
    for here, there, got in zip(levels, levels[1:], trail, strict=False):
        seen = x * where.input_scale(here.alpha, here.sigma)
        plain = x0("none", seen)
        eps = (x - here.alpha * plain) / here.sigma
        guided = plain + 0.6 * (x0("cat", seen) - plain)
        x = there.alpha * guided + there.sigma * eps
        torch.testing.assert_close(got, x)


@pytest.mark.parametrize("name", ["apg", "cfg++"])
@pytest.mark.parametrize("kind", ["flow", "vp-scaled-linear", "ve"])
def test_every_method_keeps_to_its_interval(network: Told, name: str, kind: str) -> None:
    """Inside it is bit for bit the method without an interval; outside the prompt is alone, and
    costs its own rows only. A run of DDIM through all of it is the formula, step by step."""
    where = process.create(kind)
    levels = timetable.create("trailing", where, 6)
    low, high = levels[4].ratio, levels[2].ratio  # so levels 2 and 3 are inside
    scale = 0.55 if name == "cfg++" else 3.0
    denoise = network.denoiser(where)
    whole = methods.create(name, denoise, CAT, NONE, levels, scale=scale)
    partly = methods.create(name, denoise, CAT, NONE, levels, scale=scale, interval=(low, high))
    alone = bind(denoise, CAT)
    for place, level in enumerate(levels[:-1]):
        inside = place in (2, 3)
        expected = (whole if inside else alone)(X, level).x0
        network.batches.clear()
        assert torch.equal(partly(X, level).x0, expected)
        assert network.batches == [6 if inside else 3]
        assert (whole(X, level).x0 - alone(X, level).x0).abs().max() > 1e-3
    noise = NoiseStreams(0, count=3)
    end = sampling.sample(partly, solvers.create("ddim"), levels, X, noise=noise)
    x = X
    for place, (here, there) in enumerate(pairwise(levels)):
        seen = x * where.input_scale(here.alpha, here.sigma)
        positive, plain = x0("cat", seen), x0("none", seen)
        data, kept = positive, positive  # the estimate, and that whose noise is kept
        if place in (2, 3) and name == "cfg++":
            data, kept = plain + 0.55 * (positive - plain), plain
        elif place in (2, 3):
            change = positive - plain
            along = (change * positive).sum((1, 2, 3), keepdim=True)
            along = along / positive.square().sum((1, 2, 3), keepdim=True) * positive
            data = kept = positive + 2.0 * (change - along)
        x = there.alpha * data + there.sigma * (x - here.alpha * kept) / here.sigma
    torch.testing.assert_close(end, x)


@pytest.mark.parametrize("interval", [(2.0, 1.0), (-1.0, 2.0), (math.nan, 1.0), (1.0,), None, 3])
@pytest.mark.parametrize("name", methods.names())
def test_what_is_no_interval_is_refused_by_every_method(
    network: Told, name: str, interval: tuple[float, float]
) -> None:
    with pytest.raises(UserError, match="a guidance interval is two numbers"):
        methods.create(
            name, network.denoiser(FLOW), CAT, NONE, [LEVEL], scale=0.6, interval=interval
        )
    assert network.batches == []


def test_a_weaker_model() -> None:
    def answering(shift: float) -> Denoiser:
        return lambda x, level: Estimate(told(x, shift), torch.full_like(x, shift))

    strong = answering(0.5)
    guided = guidance.from_weaker(strong, answering(0.2), scale=2.0)(X, LEVEL)
    torch.testing.assert_close(guided.x0, 2 * told(X, 0.5) - told(X, 0.2))
    torch.testing.assert_close(guided.variance, torch.full_like(X, 0.5))
    assert guidance.from_weaker(strong, answering(0.2), scale=1.0) is strong
    with pytest.raises(UserError, match="finite"):
        guidance.from_weaker(strong, strong, scale=math.nan)


def test_thresholds_are_each_pictures_own() -> None:
    def itself(x: Tensor, level: NoiseLevel) -> Estimate:
        return Estimate(x, 2 * x)

    x = X / X.abs().amax((1, 2, 3), keepdim=True) * torch.tensor([0.5, 3.0, 9.0]).view(3, 1, 1, 1)
    estimate = guidance.thresholded(itself, quantile=1.0)(x, LEVEL)
    clipped = estimate.x0
    torch.testing.assert_close(clipped[0], x[0])
    torch.testing.assert_close(clipped[1:].abs().amax((1, 2, 3)), torch.ones(2).double())
    torch.testing.assert_close(estimate.variance, 2 * x)
    half = guidance.thresholded(itself, quantile=0.5, at_least=0.1)(x, LEVEL).x0
    at_the_bound = (half.abs() - 0.1).abs() < 1e-12
    assert at_the_bound.double().flatten(1).mean(1).min() >= 0.5
    edit = guidance.DynamicThresholding(0.5, 0.1)
    assert torch.equal(edit.denoiser(itself)(x, LEVEL).x0, half)


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
        torch.testing.assert_close(guided(X, LEVEL).x0, first(X, LEVEL).x0)
    assert guidance.from_classifier(both, log_probability, strength=0.0) is both
    pure = FLOW.level(1.0)
    torch.testing.assert_close(guided(X, pure).x0, both(X, pure).x0)


def test_by_name(network: Told) -> None:
    levels = timetable.create("trailing", FLOW, 5)
    denoise = network.denoiser(FLOW)
    pairs = {
        "cfg": guidance.classifier_free(denoise, CAT, DOG, scale=0.6),
        "apg": guidance.projected(denoise, CAT, DOG, scale=0.6),
        "cfg++": guidance.cfg_plus_plus(denoise, CAT, DOG, levels, strength=0.6),
    }
    assert methods.names() == list(pairs)
    for name, expected in pairs.items():
        got = methods.create(name, denoise, CAT, DOG, levels, scale=0.6)
        assert torch.equal(got(X, levels[1]).x0, expected(X, levels[1]).x0)
        off = methods.create(name, denoise, CAT, None, levels, scale=1.0)
        assert torch.equal(off(X, LEVEL).x0, x0("cat"))
    own = partial(guidance.projected, parallel=0.5)
    got = methods.create(own, denoise, CAT, DOG, levels, scale=3.0)
    expected = guidance.projected(denoise, CAT, DOG, scale=3.0, parallel=0.5)
    assert torch.equal(got(X, LEVEL).x0, expected(X, LEVEL).x0)
    for name in ("apg", "cfg++", own):
        with pytest.raises(UserError, match="takes no rescale"):
            methods.create(name, denoise, CAT, DOG, levels, scale=0.5, rescale=0.5)
        with pytest.raises(UserError, match="needs a negative"):
            methods.create(name, denoise, CAT, None, levels, scale=0.5)
    with pytest.raises(UserError, match="did you mean 'cfg"):
        methods.create("cfgg", denoise, CAT, DOG, levels, scale=2.0)


def guided_by(name: str, denoise: ConditionedDenoiser, where: Process) -> Denoiser:
    """Each way to put branches together; with image guidance there are three, with `also` five."""
    levels = timetable.create("trailing", where, 4)
    seeing = Condition(pooled=CAT.pooled, beside=torch.full((3, 1, 4, 4), 0.5).double())
    away = Condition(pooled=NONE.pooled, beside=seeing.beside)
    blind = Condition(pooled=NONE.pooled, beside=0 * torch.ones(3, 1, 4, 4).double())
    further = [(DOG, 0.7), (telling(0.9, -0.9, 0.3), -0.4)]
    ways: dict[str, Callable[[], Denoiser]] = {
        "off": lambda: bind(denoise, CAT),
        "cfg": lambda: guidance.classifier_free(denoise, CAT, NONE, scale=3.0, rescale=0.3),
        "image": lambda: guidance.classifier_free(
            denoise, seeing, away, scale=3.0, blind=blind, image_scale=1.5
        ),
        "apg": lambda: guidance.projected(denoise, CAT, NONE, scale=3.0),
        "cfg++": lambda: guidance.cfg_plus_plus(denoise, CAT, NONE, levels, strength=0.6),
        "also": lambda: guidance.classifier_free(
            guidance.composed(denoise, further, NONE), CAT, NONE, scale=3.0
        ),
        "also, off": lambda: bind(guidance.composed(denoise, further, NONE), CAT),
        "pag": lambda: guidance.classifier_free(
            guidance.perturbed(denoise, 1, scale=2.0), CAT, NONE, scale=3.0
        ),
        "all": lambda: guidance.classifier_free(
            guidance.composed(guidance.perturbed(denoise, 2, scale=2.0), further, NONE),
            CAT,
            NONE,
            scale=3.0,
        ),
    }
    return ways[name]()


@pytest.mark.parametrize("kind", ["flow", "ve"])
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("off", 1),
        ("cfg", 2),
        ("image", 3),
        ("apg", 2),
        ("cfg++", 2),
        ("also", 4),
        ("also, off", 4),
        ("pag", 3),
        ("all", 5),
    ],
)
def test_branches_asked_together_are_branches_asked_one_by_one(
    network: Told, name: str, count: int, kind: str
) -> None:
    """No row gets another's x, condition or perturbation, however often the network is asked."""
    where = process.create(kind)
    denoise, level = network.denoiser(where), where.level_of_ratio(0.8)
    together = guided_by(name, denoise, where)
    apart = guided_by(name, one_by_one(denoise), where)
    for x in (X, X.flip(0)):  # the second time, the joined conditions are known
        network.batches.clear()
        got = together(x, level).x0
        assert network.batches == [3 * count]
        network.batches.clear()
        torch.testing.assert_close(apart(x, level).x0, got, rtol=1e-12, atol=1e-12)
        assert network.batches == [3] * count


def test_a_guidance_that_makes_new_branches_at_each_step_is_answered_rightly() -> None:
    """More of them than are kept joined, each dropped at once: its place in memory is free again,
    and so is its `id`."""
    network = Told()
    denoise = network.denoiser(FLOW)
    for step in range(200):
        shifts = torch.tensor([step / 200, -step / 100, 0.5], dtype=torch.float64)
        (alone,) = denoise(X, LEVEL, [Branch("positive", telling(*shifts.tolist()))])
        assert torch.equal(alone.x0, told(X, shifts))
        first, second = denoise(
            X,
            LEVEL,
            [
                Branch("positive", telling(*shifts.tolist())),
                Branch("further", telling(*(2 * shifts).tolist()), step % 3),
            ],
        )
        torch.testing.assert_close(first.x0, told(X, shifts), rtol=1e-12, atol=1e-12)
        doubled = told(X, 2 * shifts, step % 3)
        torch.testing.assert_close(second.x0, doubled, rtol=1e-12, atol=1e-12)
    assert network.batches == [3, 6] * 200


def test_impossible_guidance_is_refused(network: Told) -> None:
    denoise = network.denoiser(FLOW)
    with pytest.raises(UserError, match="norm above 0"):
        guidance.projected(denoise, CAT, DOG, scale=2.0, largest=0.0)
    with pytest.raises(UserError, match="between 0 and 1"):
        guidance.cfg_plus_plus(denoise, CAT, DOG, [LEVEL, FLOW.data_level()], strength=2.0)
    with pytest.raises(UserError, match="timetable"):
        guidance.cfg_plus_plus(denoise, CAT, DOG, [LEVEL], strength=0.5)

    def itself(x: Tensor, level: NoiseLevel) -> Estimate:
        return Estimate(x)

    bad: Sequence[tuple[float, float]] = [(0.0, 1.0), (1.1, 1.0), (0.5, 0.0), (0.5, math.inf)]
    for quantile, at_least in bad:
        with pytest.raises(UserError, match="quantile"):
            guidance.thresholded(itself, quantile=quantile, at_least=at_least)
        with pytest.raises(UserError, match="quantile"):
            guidance.DynamicThresholding(quantile, at_least)

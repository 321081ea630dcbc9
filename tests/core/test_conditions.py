"""Conditions: rows taken and batches joined, of different lengths too; and what a network sees."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_bundle
from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.diffusion import process
from latentdiff.diffusion.condition import Condition, joined
from latentdiff.diffusion.denoiser import Branch, ConditionedDenoiser, bind, conditioned_denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.errors import UserError

FLOW = process.create("flow")


def numbered(rows: int, length: int, start: int = 0, seen: Sequence[int] = ()) -> Condition:
    """A condition with every field; each row of each field has values of its own."""
    row = torch.arange(start, start + rows, dtype=torch.float32)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for place, count in enumerate(seen or [length] * rows):
        mask[place, :count] = True
    return Condition(
        states=row.view(-1, 1, 1) + torch.arange(length).view(1, -1, 1) / 100 + torch.zeros(2),
        mask=mask,
        pooled=row[:, None] + torch.tensor([0.1, 0.2, 0.3]),
        sizes=row[:, None] + torch.arange(6) * 10,
        beside=row.view(-1, 1, 1, 1) + torch.zeros(1, 5, 2, 2),
    )


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_rows_are_taken_in_the_order_named_and_as_often(rows: list[int]) -> None:
    whole = numbered(4, 3, seen=[1, 2, 3, 2])
    taken = whole.take(rows)
    assert taken.given().keys() == whole.given().keys()
    for name, value in taken.given().items():
        assert torch.equal(value, torch.stack([whole.given()[name][row] for row in rows]))
    assert Condition().take(rows).given() == {}


@settings(max_examples=30)
@given(st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_joined_conditions_are_their_rows_one_after_another(rows: int, lengths: list[int]) -> None:
    """Conditions of any lengths join: padding is masked, and each comes out again as it went in."""
    parts = [numbered(rows, length, 10 * place) for place, length in enumerate(lengths)]
    whole, longest = joined(parts), max(lengths)
    for place, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        back = whole.take(range(place * rows, (place + 1) * rows)).given()
        for name, value in part.given().items():
            if name in ("states", "mask"):
                assert back[name].shape[1] == longest
                assert torch.equal(back[name][:, :length], value)
                assert not back[name][:, length:].any()
            else:
                assert torch.equal(back[name], value)
    assert joined(parts[:1]) is parts[0]


def test_a_mask_is_made_where_only_some_have_one_or_a_length_differs() -> None:
    """No mask means that the network looks everywhere; that stays so beside others."""
    masked = Condition(states=torch.ones(2, 3, 4), mask=torch.tensor([[True, True, False]] * 2))
    free = Condition(states=2 * torch.ones(2, 3, 4))
    short = Condition(states=3 * torch.ones(2, 2, 4))
    whole = joined([masked, free, short])
    assert whole.mask is not None
    own, everywhere = [True, True, False], [True, True, True]
    assert whole.mask.tolist() == [own, own, everywhere, everywhere, own, own]
    beside_masked = joined([free, masked])
    assert beside_masked.mask is not None
    assert beside_masked.mask.tolist() == [everywhere, everywhere, own, own]
    assert joined([free, free]).mask is None


@pytest.mark.parametrize(
    "other",
    [
        Condition(states=torch.zeros(1, 3, 5)),
        Condition(states=torch.zeros(1, 3, 4), pooled=torch.zeros(1, 2)),
        Condition(pooled=torch.zeros(1, 2)),
        Condition(),
    ],
)
def test_conditions_that_do_not_fit_are_one_clear_line(other: Condition) -> None:
    with pytest.raises(UserError, match="same fields and shapes") as caught:
        joined([Condition(states=torch.zeros(1, 3, 4)), other])
    assert "\n" not in str(caught.value)


BUNDLES: dict[str, Bundle] = {}


def bundle(tower: str) -> Bundle:
    if tower not in BUNDLES:
        BUNDLES[tower] = tiny_bundle(tower="t5") if tower == "t5" else tiny_bundle()
    return BUNDLES[tower]


@pytest.mark.parametrize("tower", ["clip", "t5"])
def test_a_real_network_answers_branches_together_as_one_by_one(tower: str) -> None:
    """Prompts of different lengths, each encoded alone; T5 does not pad them to one length."""
    model = bundle(tower)
    prompts = ["a red heart", "", "the face of a sad dog, flat style"]
    conditions = [model.conditioner.encode([text] * 2, model.size).condition for text in prompts]
    if tower == "t5":
        lengths = {c.states.shape[1] for c in conditions if c.states is not None}
        assert len(lengths) == 3
    x, level = NoiseStreams(0, count=2).draw((4, 8, 8)), model.process.level(500.0)
    denoise = conditioned_denoiser(model.network, model.process, model.prediction)
    roles = ("positive", "negative", "further")
    branches = [Branch(role, c) for role, c in zip(roles, conditions, strict=True)]
    together = denoise(x, level, branches)
    for branch, estimate in zip(branches, together, strict=True):
        (alone,) = denoise(x, level, [branch])
        assert (alone.x0 - estimate.x0).abs().max() < 1e-5
    for place in range(3):  # and no two of the prompts say the same
        other = together[(place + 1) % 3].x0
        assert (together[place].x0 - other).abs().max() > 1e-3


@pytest.mark.parametrize("tower", ["clip", "t5"])
def test_perturbed_rows_are_those_of_their_branch(tower: str) -> None:
    """In one batch with others, a spoilt branch is what it is alone; the others are untouched."""
    from latentdiff.models.perturbation import BlurredQueries, IdentityAttention

    model = bundle(tower)
    network = model.network.perturbable([IdentityAttention(), BlurredQueries(1.0)])
    prompts = ["a red heart", "a green heart with an arrow"]
    one, other = (model.conditioner.encode([text] * 2, model.size).condition for text in prompts)
    denoise = conditioned_denoiser(network, model.process, model.prediction)
    x, level = NoiseStreams(0, count=2).draw((4, 8, 8)), model.process.level(500.0)
    branches = [
        Branch("positive", one),
        Branch("further", other, 2),
        Branch("further", one, 1),
        Branch("negative", other),
    ]
    together = denoise(x, level, branches)
    plain = conditioned_denoiser(model.network, model.process, model.prediction)
    for branch, estimate in zip(branches, together, strict=True):
        (alone,) = denoise(x, level, [branch])
        assert (alone.x0 - estimate.x0).abs().max() < 1e-5
        unspoilt = bind(plain, branch.condition)(x, level).x0
        gap = (unspoilt - estimate.x0).abs().max()
        assert gap > 1e-4 if branch.perturbation else gap < 1e-5


def test_times_are_float32_or_better_and_scaled_inputs_arrive() -> None:
    """In half precision, too: t = 998 and 999 are one number in bfloat16."""
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int]) -> Tensor:
        seen.append((x, t))
        return x

    where = process.create("edm")
    denoise: ConditionedDenoiser = conditioned_denoiser(network, where, "x0")
    level = where.level_of_ratio(3.0)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.ones(2, 1, 2, 2, dtype=dtype)
        branches = [Branch("positive", Condition()), Branch("negative", Condition())]
        estimates = denoise(x, level, branches)
        given, t = seen.pop()
        assert t.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(t, torch.full((4,), level.t, dtype=t.dtype))
        torch.testing.assert_close(given, torch.full_like(given, 1 / 10**0.5))
        assert all(estimate.x0.dtype == dtype for estimate in estimates)

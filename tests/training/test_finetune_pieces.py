"""Pieces of a fine-tune: buckets of a step, captions with and without a cache."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CAPTIONS, tiny_bundle, tower_of

from latentdiff.learning.buckets import CYCLE, BucketOrder
from latentdiff.learning.captions import Captions, CaptionStates
from latentdiff.learning.denoising import Conditioned, offset_noise
from latentdiff.learning.ema import EMA
from latentdiff.learning.order import SampleOrder
from latentdiff.models.conditioner import TextConditioner
from latentdiff.models.fresh_text import train_tokenizer
from latentdiff.models.text_encoders import ClipTower


@given(st.integers(1, 9), st.integers(0, 99), st.integers(0, 3000))
def test_with_one_bucket_the_order_is_the_plain_one(size: int, seed: int, step: int) -> None:
    plain, order = SampleOrder(7, seed), BucketOrder(["x"] * 7, seed)
    assert order.batch(step, size) == plain.batch(step, size)


@pytest.mark.parametrize("weighted", [False, True])
def test_every_step_has_one_bucket_and_every_sample_its_share(weighted: bool) -> None:
    buckets = ["a"] * 50 + ["b"] * 13 + ["c"]
    weights = np.ones(64)
    if weighted:
        weights[:50] = 13 / 50
    order = BucketOrder(buckets, 3, weights)
    steps = 8 * CYCLE
    batches = [order.batch(step, 4) for step in range(steps)]
    assert all(len({buckets[i] for i in batch}) == 1 for batch in batches)
    drawn = Counter(i for batch in batches for i in batch)
    expected = weights / weights.sum() * steps * 4
    for sample, count in enumerate(expected):
        assert abs(drawn[sample] - count) < 0.05 * count + 10
    fresh = BucketOrder(buckets, 3, weights)
    for step in (steps - 1, 700, 3):  # in any order, from anew: a function of the step alone
        assert fresh.batch(step, 4) == batches[step]


def test_buckets_of_one_size_have_orders_of_their_own() -> None:
    order = BucketOrder(["a"] * 40 + ["b"] * 40, 3)
    first, second = (own.epoch(0).tolist() for own in order.orders)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second


@pytest.mark.parametrize("tower", ["clip", "t5"])
def test_cached_states_are_those_of_the_tower(tower: str, tmp_path: Path) -> None:
    bundle = tiny_bundle(tower=tower)  # pyright: ignore[reportArgumentType]
    texts = [("a red heart", "heart"), ("a cat",), ("a red cat on a heart",)]
    captions = Captions(bundle.conditioner, texts, 0.3, seed=1)
    network = Conditioned(bundle)
    states = CaptionStates(captions, bundle.conditioner, tmp_path)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3.0, 500.0, 999.0])
    chosen: set[int] = set()
    for step in range(6):
        at = (step, [0, 1, 2], [0, 1, 2])
        chosen.update(captions.choose(*at))
        with torch.no_grad():
            live, kept = network(x, t, captions.tokens(*at)), network(x, t, states.of(*at))
        assert (live - kept).abs().max() < 1e-5
    assert chosen == {0, 1, 2, 3, 4}


def test_states_are_those_of_the_padding_and_the_window_that_the_tower_has(tmp_path: Path) -> None:
    model = tower_of(tiny_bundle()).model
    for window, pad in ((12, "<|endoftext|>"), (12, "!"), (10, "!")):
        tokenizer = train_tokenizer(CAPTIONS, 560, window)
        tokenizer.pad_token = pad
        tower = ClipTower(model, tokenizer)  # pyright: ignore[reportArgumentType]
        conditioner = TextConditioner(tower)
        captions = Captions(conditioner, [("a cat",)], 0, seed=0)
        kept = CaptionStates(captions, conditioner, tmp_path).of(0, [0], [0]).states
        with torch.no_grad():
            assert torch.equal(kept, tower.encode(["a cat"]).states)


def test_each_sample_loses_its_caption_with_its_own_probability() -> None:
    texts = [("a cat",), ("a heart",), ("a dog",)]
    captions = Captions(tiny_bundle().conditioner, texts, [0, 1, 0.5], 1)
    rows = [captions.choose(step, [0, 1, 2], [0, 1, 2]) for step in range(200)]
    assert {row[:2] for row in map(tuple, rows)} == {(1, 0)}
    assert 70 < sum(row[2] == 0 for row in rows) < 130


def test_offset_noise_is_standard_and_a_function_of_its_place() -> None:
    noise = offset_noise(5, 2, list(range(4000)), 3)
    assert noise.shape == (4000, 3, 1, 1)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert torch.equal(offset_noise(5, 2, [7], 3)[0], noise[7])


def test_only_what_is_trained_is_averaged() -> None:
    frozen, live = torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 1)
    module = torch.nn.Sequential(frozen, live)
    ema = EMA(module, 0.5)
    assert list(ema.state_dict()) == ["1.weight", "1.bias"]
    with torch.no_grad():
        live.weight.add_(1.0)
    ema.update()
    after = live.weight.detach().clone()
    with ema.applied():
        assert torch.equal(live.weight, ema.shadow[0])
        assert not torch.equal(live.weight, after)
    assert torch.equal(live.weight, after)

"""Pieces of a fine-tune: buckets of a step, captions with and without a cache."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import CAPTIONS, tiny_bundle, tower_of

from latentdiff.data.examples import Example
from latentdiff.data.variants import Variant
from latentdiff.diffusion.process import create
from latentdiff.errors import UserError
from latentdiff.learning.buckets import CYCLE, BucketOrder
from latentdiff.learning.captions import Captions, CaptionStates
from latentdiff.learning.denoising import Conditioned, draw_times, offset_noise
from latentdiff.learning.ema import EMA
from latentdiff.learning.finetune_config import CaptionsConfig
from latentdiff.learning.loss_masks import LossMasks
from latentdiff.learning.losses import weighted_loss, weighted_mse
from latentdiff.learning.order import SampleOrder
from latentdiff.learning.tags import check_style, varied
from latentdiff.lora import add_lora, lora_of
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


def test_tags_change_places_and_go_but_the_first_and_the_style_stay() -> None:
    config = CaptionsConfig(style="flat style", shuffle=True, keep=1, drop=0.3)
    caption = "a cat, red, sad, big, old, flat style"
    found = varied([caption], config, 5, 3)
    assert found == varied([caption], config, 5, 3) != varied([caption], config, 5, 4)
    assert len(found) > 4
    for text in found:
        first, *tags, style = text.split(", ")
        assert (first, style) == ("a cat", "flat style")
        assert set(tags) <= {"red", "sad", "big", "old"}
        assert len(set(tags)) == len(tags)
    assert len({text.count(",") for text in found}) > 1  # some are left out
    orders = varied([caption], CaptionsConfig(style="flat style", shuffle=True), 5, 3)
    assert all(sorted(text.split(", ")) == sorted(caption.split(", ")) for text in orders)
    assert varied([caption], CaptionsConfig(), 5, 3) == (caption,)


def test_the_style_and_the_content_of_a_caption_are_left_out_as_often_as_asked() -> None:
    conditioner = TextConditioner(tower_of(tiny_bundle()))
    config = CaptionsConfig(style="flat style", style_dropout=0.2, content_dropout=0.3)
    texts = [["a cat, flat style"], ["a dog"]]
    captions = Captions(conditioner, texts, 0.0, 7, config)
    every = ["", "a cat, flat style", "a dog", "a cat", "flat style"]
    assert torch.equal(captions.all.ids, conditioner.tokenize(every).ids)
    drawn = Counter(captions.choose(1, list(range(2000)), [0] * 2000))
    shares = [drawn[every.index(text)] / 2000 for text in (every[1], "a cat", "flat style")]
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.04)
    assert sum(shares) == 1
    other = captions.choose(1, list(range(2000)), [1] * 2000)
    assert set(other) == {every.index("a dog")}
    with pytest.raises(UserError, match="no caption is something followed by 'noir'"):
        check_style(["a cat", "noir"], "noir")


def test_a_pseudo_huber_loss_is_square_near_zero_and_linear_far_away() -> None:
    zero, one = torch.zeros(1, 1, 2, 2), torch.ones(1)
    near, far = zero + 1e-3, zero + 100.0
    assert weighted_loss(near, zero, one, 0.1) == pytest.approx(1e-6, rel=1e-3)
    assert weighted_loss(far, zero, one, 0.1) == pytest.approx(2 * 0.1 * (100 - 0.1), rel=1e-4)
    assert weighted_loss(far, zero, one) == pytest.approx(1e4)


def test_what_is_masked_says_nothing_and_the_rest_as_much_as_a_whole_picture() -> None:
    output = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    target, weights = torch.zeros(2, 3, 4, 4), torch.tensor([1.0, 2.0])
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :, :2] = 1
    loss = weighted_loss(output, target, weights, mask=mask)
    assert loss == pytest.approx(weighted_mse(output[..., :2], target[..., :2], weights))
    output[..., 2:] += 9
    assert weighted_loss(output, target, weights, mask=mask) == loss
    whole = weighted_loss(output, target, weights, mask=torch.ones(2, 1, 4, 4))
    assert whole == pytest.approx(weighted_mse(output, target, weights))


def test_masks_are_the_alpha_or_the_file_beside_and_follow_crop_and_flip(tmp_path: Path) -> None:
    pixels = np.full((32, 32, 4), 255, dtype=np.uint8)
    pixels[:, 8:, 3] = 0  # the left quarter is opaque
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "b.png")
    Image.fromarray(pixels[..., 3]).save(tmp_path / "m.png")
    rows = [Example(tmp_path / name, ("a",), {"mask": "m.png"}) for name in ("a.png", "b.png")]
    both = [Variant(), Variant(flip=True)]
    quarter = torch.zeros(4, 4)
    quarter[:, 0] = 1
    alpha = LossMasks(rows, [(32, 32)] * 2, both, "alpha", tmp_path, 8)
    shape = torch.Size([2, 4, 4, 4])
    assert torch.equal(
        alpha.of([(0, 0), (0, 1)], shape)[:, 0], torch.stack([quarter, quarter.flip(1)])
    )
    assert torch.equal(alpha.of([(1, 0), (9, 0)], shape), torch.ones(2, 1, 4, 4))  # no alpha; prior
    field = LossMasks(rows, [(32, 32)] * 2, both, "mask", tmp_path, 8)
    assert torch.equal(field.of([(1, 0)], shape)[0, 0], quarter)
    outside = [Example(tmp_path / "a.png", ("a",), {"mask": "../m.png"})]
    with pytest.raises(UserError, match="lies outside"):
        LossMasks(outside, [(32, 32)], both, "mask", tmp_path, 8)
    Image.new("L", (32, 32)).save(tmp_path / "m.png")
    with pytest.raises(UserError, match="nothing of it counts"):
        LossMasks(rows, [(32, 32)] * 2, both, "mask", tmp_path, 8)


@pytest.mark.parametrize("process", ["vp-cosine", "flow"])
def test_times_are_drawn_within_their_range(process: str) -> None:
    made, uniform = create(process), torch.arange(0, 1, 1 / 64, dtype=torch.float64)
    span = made.t_max - made.t_min
    for kind in ("uniform", "logit-normal"):
        t = (draw_times(made, uniform, kind, (0.25, 0.5)) - made.t_min) / span
        assert 0.25 - 1e-2 <= t.min() < 0.3
        assert 0.45 < t.max() <= 0.5 + 1e-2


def test_a_lora_may_be_in_some_blocks_alone() -> None:
    bundle = tiny_bundle()
    add_lora(bundle, rank=2, targets="all", blocks=["up_blocks", "conv_out"])
    unet = lora_of(bundle).unet
    assert unet
    assert all(name.startswith("up_blocks.") for name in unet)
    with pytest.raises(UserError, match=r"begins with \['side_blocks'\]"):
        add_lora(tiny_bundle(), rank=2, blocks=["side_blocks"])

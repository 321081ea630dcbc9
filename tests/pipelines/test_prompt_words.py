"""Weighted words and further prompts through the pipeline: the states and batches of the U-Net."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WINDOW, tiny_bundle, tiny_clip, tiny_t5, tower_of, unet_of
from torch import Tensor

from latentdiff import LatentDiffusionPipeline
from latentdiff.models.prompt_weights import parse_weights, token_weights
from latentdiff.models.text_encoders import TextTower, token_spans
from latentdiff.pipeline import PipelineOutput

CLIP = LatentDiffusionPipeline(tiny_bundle())
T5 = LatentDiffusionPipeline(tiny_bundle(tower="t5"))
PIPES = pytest.mark.parametrize("pipe", [CLIP, T5], ids=["clip", "t5"])
TOWERS: list[TextTower] = [tiny_clip(), tiny_t5()]
WORDS = st.sampled_from(["red", "heart", "Cat", "island,", "naïve", "pizza!", "dog"])


def draw(prompt: Any, pipe: LatentDiffusionPipeline = CLIP, **changed: Any) -> PipelineOutput:
    arguments = {"num_inference_steps": 2, "output_type": "pt", "progress": False, "seed": 3}
    return pipe(prompt, **arguments | changed)


@contextmanager
def states_seen(pipe: LatentDiffusionPipeline) -> Iterator[list[Tensor]]:
    """The text states of every call of the U-Net."""
    seen: list[Tensor] = []
    hook = unet_of(pipe.bundle).register_forward_pre_hook(
        lambda _, inputs, named: seen.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WORDS, st.floats(0.1, 3.0)), min_size=1, max_size=8))
def test_every_token_has_the_weight_of_its_word(words: list[tuple[str, float]]) -> None:
    """As many tokens as each word makes alone, cut where the window ends, marks left alone."""
    prompt = " ".join(f"({word}:{weight:.2f})" for word, weight in words)
    pieces = parse_weights(prompt)
    plain = "".join(text for text, _ in pieces)
    assert plain == " ".join(word for word, _ in words)
    for tower in TOWERS:
        expected: list[float] = []
        for word, weight in words:
            alone = tower.tokenizer.backend_tokenizer.encode(word, add_special_tokens=False).ids
            expected += [float(f"{weight:.2f}")] * len(alone)
        start = [1.0] if tower is TOWERS[0] else []
        expected = [*start, *expected][: WINDOW - 1] + [1.0]
        assert token_weights(pieces, token_spans(tower, plain)) == expected
        assert len(expected) == int(tower.tokenize([plain]).mask.sum())


def test_a_token_across_two_weights_has_their_mean() -> None:
    assert token_weights([("he", 1.0), ("art", 2.0)], [(0, 0), (0, 5), (0, 0)]) == [1.0, 1.6, 1.0]
    assert token_weights([("a ", 1.0), ("b", 2.0)], [(0, 1), (1, 3), (1, 2)]) == [1.0, 2.0, 1.0]


@PIPES
def test_words_move_by_their_weights_in_the_prompt_and_the_negative_one(
    pipe: LatentDiffusionPipeline,
) -> None:
    """empty + w (states - empty), place by place, of the very tokens of the plain prompt."""
    with states_seen(pipe) as seen:
        draw("a (red:1.5) heart", pipe, prompt_weights=True, negative_prompt="[cat], dog")
    tower = tower_of(pipe.bundle)
    with torch.no_grad():
        plain = tower.encode(["cat, dog", "a red heart", ""]).states
    pieces = ([("cat", 1 / 1.1), (", dog", 1.0)], [("a ", 1.0), ("red", 1.5), (" heart", 1.0)])
    for index, each in enumerate(pieces):
        text = "".join(words for words, _ in each)
        weights = torch.ones(plain.shape[1])
        told = token_weights(each, token_spans(tower, text))
        weights[: len(told)] = torch.tensor(told)
        assert 0 < (weights != 1).sum() < len(told) - 1
        expected = plain[2] + weights[:, None] * (plain[index] - plain[2])
        torch.testing.assert_close(seen[0][index], expected)


def test_weights_of_1_change_nothing_and_brackets_are_words_unless_asked() -> None:
    plain = draw("a red heart").images
    assert torch.equal(draw("a (red:1.0) heart", prompt_weights=True).images, plain)
    assert not torch.equal(draw("a (red:1.4) heart", prompt_weights=True).images, plain)
    escaped = draw(r"a \(red\) cat", prompt_weights=True).images
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(draw("a (red) cat").images, escaped)
    with pytest.warns(UserWarning, match="plain words"):
        draw("a (red:1.4) heart")


def test_further_prompts_are_in_the_one_batch_and_add_up() -> None:
    with states_seen(CLIP) as seen:
        both = draw("a cat", num_images_per_prompt=2, also=[("a dog", 0.5), "pizza:-0.5", "a cat"])
    assert [len(states) for states in seen] == [10] * 2
    assert both.nfe == 2
    # the prompt once more at its own weight is guidance of twice the scale
    twice = draw("a cat", also=["a cat"], guidance_scale=2.0).images
    assert (twice - draw("a cat", guidance_scale=4.0).images).abs().max() < 1e-4
    none = draw("a cat", also=[("a dog", 0.0)]).images
    assert (none - draw("a cat").images).abs().max() < 1e-4
    one, other = (draw("a cat", also=a).images for a in ([("a dog", 0.7)], ["a dog: .7"]))
    assert torch.equal(one, other)
    assert (one - none).abs().max() > 1e-3


def test_further_prompts_with_everything_at_once() -> None:
    """Perturbed attention, a learned variance, weights of words, T5's padding."""
    pipe = LatentDiffusionPipeline(tiny_bundle(tower="t5", learned_variance=True))
    settings: dict[str, Any] = {"solver": "ddpm", "edits": ["pag:2"], "prompt_weights": True}
    further = [("a (sad:1.3) dog with an arrow", 0.5)]
    both = draw(["a cat", "pizza"], pipe, also=further, seed=[1, 2], **settings)
    alone = draw("pizza", pipe, also=further, seed=2, **settings)
    assert (both.images[1] - alone.images[0]).abs().max() < 1e-4
    without = draw("pizza", pipe, seed=2, **settings)
    assert (without.images - alone.images).abs().max() > 1e-3

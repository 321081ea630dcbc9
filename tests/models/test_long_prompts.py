"""Prompts beyond the window: each chunk is what the encoder says of it alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_bundle, tower_of

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.cli import main
from latentdiff.cli.output import draw_in_parts
from latentdiff.models.conditioner import TextConditioner
from latentdiff.models.long_prompts import long_states
from latentdiff.models.text_encoders import (
    ClipTower,
    Reading,
    TextStates,
    Tokens,
    WeightRule,
    encode_tokens,
)
from latentdiff.pipeline import Request

LONG = "a red heart with a cat and a dog, a big hat, two small birds and one more red heart"


@pytest.fixture(scope="module")
def tower() -> ClipTower:
    found = tower_of(tiny_bundle())
    assert isinstance(found, ClipTower)
    return found


@torch.no_grad()
def by_hand(tower: ClipTower, chunks: list[list[int]]) -> torch.Tensor:
    """The states of chunks of ids, one call each, one after another [chunks * window, D]."""
    start, end = (encode_tokens(tower.tokenizer, "")[place][0] for place in (0, -1))
    states: list[torch.Tensor] = []
    for chunk in chunks:
        ids = [start, *chunk, end]
        ids += [tower.tokenizer.pad_token_id] * (tower.window - len(ids))
        states.append(tower.model(input_ids=torch.tensor([ids])).last_hidden_state[0])
    return torch.cat(states)


@torch.no_grad()
def test_states_are_those_of_the_chunks_one_after_another(tower: ClipTower) -> None:
    words = [token for token, _ in encode_tokens(tower.tokenizer, LONG)[1:-1]]
    inside = tower.window - 2
    assert len(words) > 2 * inside
    chunks = [words[at : at + inside] for at in range(0, len(words), inside)]
    states = long_states(tower, [LONG, "a cat"]).states
    assert states.shape[1] == len(chunks) * tower.window
    assert (states[0] - by_hand(tower, chunks)).abs().max() < 1e-5
    cat = [token for token, _ in encode_tokens(tower.tokenizer, "a cat")[1:-1]]
    assert (states[1] - by_hand(tower, [cat, *[[]] * (len(chunks) - 1)])).abs().max() < 1e-5


@torch.no_grad()
def test_a_prompt_within_the_window_is_as_ever_and_break_ends_a_chunk(tower: ClipTower) -> None:
    short = ["a red heart", "a (cat)", ""]
    assert torch.equal(long_states(tower, short[:1]).states, tower.encode(short[:1]).states)
    rules: tuple[WeightRule | None, ...] = (None, "comfyui", "a1111")
    for rule in rules:
        conditioner = TextConditioner(tower)
        plain = conditioner.encode(short, (16, 16), Reading(rule)).condition.states
        long = conditioner.encode(short, (16, 16), Reading(rule, long=True)).condition.states
        assert plain is not None
        assert long is not None
        assert (plain - long).abs().max() < 1e-6
    parted = long_states(tower, ["a red heart BREAK a cat"]).states[0]
    alone = [long_states(tower, [text]).states[0] for text in ("a red heart", "a cat")]
    assert (parted - torch.cat(alone)).abs().max() < 1e-5


@torch.no_grad()
def test_weights_reach_their_words_in_any_chunk(tower: ClipTower) -> None:
    weighted = LONG.replace("two small birds", "(two small birds:1.4)")
    plain = long_states(tower, [LONG]).states[0]
    heavy = long_states(tower, [weighted], Reading("comfyui")).states[0]
    spans = encode_tokens(tower.tokenizer, LONG)[1:-1]
    first, last = LONG.index("two small"), LONG.index("birds") + 5
    inside = tower.window - 2
    touched = {
        n // inside * tower.window + 1 + n % inside
        for n, (_, (start, end)) in enumerate(spans)
        if start >= first and end <= last
    }
    moved = (plain - heavy).abs().amax(1) > 1e-6
    assert set(moved.nonzero().flatten().tolist()) == touched
    nothing = long_states(tower, [""]).states[0]
    for place in touched:
        expected = nothing[place % tower.window] + 1.4 * (
            plain[place] - nothing[place % tower.window]
        )
        assert (heavy[place] - expected).abs().max() < 1e-5


def test_the_end_of_a_long_prompt_moves_the_picture(tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    ends = [f"{LONG}, {end}" for end in ("a cat", "a dog")]
    rest = {"num_inference_steps": 2, "seed": 0, "output_type": "latent", "progress": False}
    with pytest.warns(UserWarning, match=r"\(long_prompts=True, --long, reads all of it\)"):
        cut = [pipe(end, **rest).latents for end in ends]  # pyright: ignore[reportArgumentType]
    assert torch.equal(cut[0], cut[1])
    long = [pipe(end, long_prompts=True, **rest).latents for end in ends]  # pyright: ignore[reportArgumentType]
    assert not torch.equal(long[0], long[1])
    model = str(tiny_bundle().save(tmp_path / "model"))
    command = ["generate", LONG, "--long", "--model", model, "--steps", "1", "-o", str(tmp_path)]
    assert main(command) == 0


def test_what_reads_no_chunks_is_refused() -> None:
    bundle = tiny_bundle(tower="t5")
    with pytest.raises(UserError, match="only CLIP text encoders"):
        long_states(tower_of(bundle), ["a"])
    clip = tower_of(tiny_bundle())
    with pytest.raises(UserError, match="say it shorter"):
        long_states(clip, ["a cat " * 400])


@torch.no_grad()
def test_many_chunks_are_encoded_in_parts(
    tower: ClipTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As each prompt alone, and never more than 64 in one batch."""
    prompts = [f"(a cat:1.2) BREAK {number}" + " BREAK a dog" * 6 for number in range(12)]
    reading = Reading("a1111", long=True)
    alone = torch.cat([long_states(tower, [prompt], reading).states for prompt in prompts])
    batches: list[int] = []
    states = tower.states

    def counted(tokens: Tokens, clip_skip: int = 0) -> TextStates:
        batches.append(len(tokens.ids))
        return states(tokens, clip_skip)

    monkeypatch.setattr(tower, "states", counted)
    together = long_states(tower, prompts, reading).states
    assert batches == [64, 12 * 8 + 1 - 64]
    assert (together - alone).abs().max() < 1e-5


def test_the_command_line_draws_a_prompt_as_it_is_alone() -> None:
    """A short prompt has no chunks of a longer one that is drawn beside it."""
    pipe = LatentDiffusionPipeline(tiny_bundle())
    request = Request(seed=1, num_inference_steps=2, long_prompts=True, guidance_scale=1.0)
    prompts = ["a cat", "a cat", LONG, "a cat"]
    drawn = [np.asarray(one[2], int) for one in draw_in_parts(pipe, prompts, request, 256)]
    for place in (0, 1, 3):
        part = replace(request, prompt="a cat", first=place)
        alone = np.asarray(pipe.prepare(part).finish().images[0], int)
        assert np.abs(drawn[place] - alone).max() <= 1
    plain = replace(request, prompt=["a cat", LONG])
    beside = np.asarray(pipe.prepare(plain).finish().images[0], int)
    assert np.abs(drawn[0] - beside).max() > 1

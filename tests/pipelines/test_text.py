"""Text towers: the ids transformers gives, and no word lost in silence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CAPTIONS, WINDOW, clip_tokenizer, t5_tokenizer, tiny_clip, tiny_t5

from latentdiff.errors import UserError
from latentdiff.models.fresh_text import build_text_encoder
from latentdiff.models.text_encoders import ClipTower, TextTower

# Half characters (surrogates) are refused before a tower sees them.
CHARACTERS = st.characters(exclude_categories=["Cs"])
PROMPTS = st.one_of(
    st.text(CHARACTERS, max_size=40),
    st.lists(st.sampled_from(" ".join(CAPTIONS).split()), max_size=20).map(" ".join),
)
TOWERS: dict[str, TextTower] = {"clip": tiny_clip(), "t5": tiny_t5()}
# A call of transformers sets truncation and padding on the tokenizer: these are of its own.
REFERENCES = {"clip": clip_tokenizer.__wrapped__(), "t5": t5_tokenizer.__wrapped__()}
LONG = "a red heart and the face of a sad dog, flat style, with pizza"


@settings(deadline=None, max_examples=50)
@given(st.lists(PROMPTS, min_size=1, max_size=3))
def test_ids_are_those_of_transformers(prompts: list[str]) -> None:
    for name, tower in TOWERS.items():
        padding = "max_length" if name == "clip" else "longest"
        theirs = REFERENCES[name](
            prompts, padding=padding, truncation=True, max_length=WINDOW, return_tensors="pt"
        )
        ours = tower.tokenize(prompts)
        assert torch.equal(ours.ids, theirs.input_ids)
        assert torch.equal(ours.mask, theirs.attention_mask.bool())


@settings(deadline=None, max_examples=50)
@given(PROMPTS)
def test_what_is_cut_is_the_end_of_the_prompt(prompt: str) -> None:
    for tower in TOWERS.values():
        tokens = tower.tokenize([prompt])
        [cut] = tokens.cut
        whole = tower.tokenizer.backend_tokenizer.encode(prompt).ids
        assert prompt.endswith(cut)
        assert bool(cut) == (len(whole) > WINDOW)
        if not cut:
            assert tokens.ids[0][tokens.mask[0]].tolist() == whole


@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_states(tower: TextTower) -> None:
    with torch.no_grad():
        alone = tower.encode(["a red heart"])
        both = tower.encode(["a red heart", LONG])
    length = alone.states.shape[1]
    assert both.states.shape == (2, WINDOW, tower.width)
    assert (both.states[0, :length] - alone.states[0]).abs().max() < 1e-5
    assert (both.states[0] - both.states[1])[:length].abs().max() > 0.01
    assert both.cut[0] == ""
    assert LONG.endswith(both.cut[1])
    assert both.cut[1].endswith("with pizza")
    if isinstance(tower, ClipTower):
        assert both.mask is None
        assert length == WINDOW
    else:
        assert both.mask is not None
        assert both.mask.sum(1).tolist() == [length, WINDOW]


def test_a_tower_trains() -> None:
    tower = tiny_clip()
    tower.encode(["a red heart"]).states.square().mean().backward()
    gradients = [p.grad for p in tower.model.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in gradients) > 0


def test_a_tokenizer_that_knows_more_than_its_encoder_is_refused() -> None:
    tokenizer = clip_tokenizer()
    model = build_text_encoder(tokenizer, 8, 1, 1)
    model.config.vocab_size = 8
    with pytest.raises(UserError, match="knows only 8 tokens"):
        ClipTower(model, tokenizer)

"""The bundled vocabulary of CLIP: transformers' class makes the same tokens of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from latentdiff.formats.location import clip_tokenizer
from latentdiff.formats.tokenizer_files import load_tokenizer
from latentdiff.models.clip_tokenizer import ClipTokenizer

OURS = load_tokenizer(clip_tokenizer(), "CLIPTokenizer")
THEIRS = CLIPTokenizer.from_pretrained(str(clip_tokenizer()), local_files_only=True)
WORDS = [
    "a photo of",
    "Cat's",
    "naïve",
    "1,234",
    "<|endoftext|>",
    "\n\t",
    "🙂",
    "猫",
    "don't",
    "@@ #x",
]


def test_it_is_ours_and_holds_what_clip_knows() -> None:
    assert isinstance(OURS, ClipTokenizer)
    vocabulary = OURS.backend_tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == [*range(49408)]
    assert OURS.model_max_length == 77
    assert OURS.pad_token_id == 49407


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),  # as CLIP's own notebooks have them
        ("a photo of a dog", [320, 1125, 539, 320, 1929]),
        ("hello world", [3306, 1002]),
    ],
)
def test_known_tokens(text: str, ids: list[int]) -> None:
    assert OURS.backend_tokenizer.encode(text).ids == [49406, *ids, 49407]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=8)), max_size=6).map(" ".join))
def test_tokens_are_those_of_transformers(text: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return
    assert OURS.backend_tokenizer.encode(text).ids == THEIRS(text)["input_ids"]

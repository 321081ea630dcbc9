"""Weights inside prompts: the examples of the web UI, nesting, escapes, and any text at all."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.errors import UserError
from latentdiff.models.prompt_weights import has_weights, parse_weights
from latentdiff.pipeline.prompts import check_also


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("a [dim] one", [("a ", 1.0), ("dim", 1 / 1.1), (" one", 1.0)]),
        ("(x:1.3)", [("x", 1.3)]),
        ("(x: .5 )", [("x", 0.5)]),
        ("((a)b:2)", [("a", 2.2), ("b", 2.0)]),
        ("[(a)]", [("a", 1.0)]),
        ("ratio 3:2, b)", [("ratio 3:2, b)", 1.0)]),
        ("a:1.5)", [("a:1.5)", 1.0)]),
        ("", [("", 1.0)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
    ],
)
def test_examples(prompt: str, expected: list[tuple[str, float]]) -> None:
    got = parse_weights(prompt)
    assert [text for text, _ in got] == [text for text, _ in expected]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in expected])


@given(st.text(st.sampled_from("ab ()[]\\:1.5,\n")))
def test_any_text_parses_and_no_letter_is_lost(prompt: str) -> None:
    pieces = parse_weights(prompt)
    assert all(weight == weight for _, weight in pieces)
    text = "".join(text for text, _ in pieces)
    assert [c for c in text if c in "ab,"] == [c for c in prompt if c in "ab,"]


@given(st.text(st.characters(exclude_characters="()[]\\")))
def test_text_without_brackets_is_itself(prompt: str) -> None:
    assert parse_weights(prompt) == [(prompt, 1.0)]


@pytest.mark.parametrize("text", ["(a:" + "1" * 9000 + "x", ":1" * 5000, "a:" * 5000])
def test_no_text_takes_long_to_read(text: str) -> None:
    start = time.process_time()
    has_weights(text)
    parse_weights(text)
    with pytest.raises(UserError):
        check_also([text * 10])
    assert time.process_time() - start < 0.5

"""Weights inside a prompt, in the syntax that the Stable Diffusion web UI (A1111) made common."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.models.text_encoders import (
    Reading,
    TextStates,
    TextTower,
    WeightRule,
    token_spans,
)

LARGEST = 10.0
MOST_NESTED = 100

_TOKEN = re.compile(
    r"\\[()\[\]\\]"  # an escaped bracket or backslash
    r"|:\s*(?P<weight>[+-]?(?:\d++\.?+\d*+|\.\d++))\s*+\)"  # the end of (text:weight)
    r"|[()\[\]]"
    r"|[^\\()\[\]:]+"
    r"|.",  # a colon or a backslash of the text itself
    re.DOTALL,
)
_ROUND, _SQUARE = 1.1, 1 / 1.1
_EXPLICIT = re.compile(r"\([^():]*+(?::[^():]*+)*:\s*+[+-]?(?:\d++\.?+\d*+|\.\d++)\s*+\)")


def has_weights(prompt: str) -> bool:
    """Tell whether a prompt has an explicit weight such as (x:1.3), never written by chance."""
    return _EXPLICIT.search(prompt) is not None


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""The pieces of a prompt and their weights.

    `(x)` weighs 1.1, `((x))` 1.21, `[x]` 1 / 1.1 and `(x:1.3)` 1.3; they nest by multiplication.
    `\(`, `\)`, `\[`, `\]` and `\\` are the characters themselves. A bracket that is never closed
    reaches to the end; one that was never opened is text.

    Returns:
        (text, weight) pairs, neighbours of one weight joined; [("", 1.0)] for no text.

    Raises:
        UserError: a weight beyond +-10, or brackets in brackets, more than 100 deep.
    """
    pieces: list[tuple[str, float]] = []
    rounds: list[int] = []
    squares: list[int] = []

    def multiply(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in _TOKEN.finditer(prompt):
        token = match.group()
        if token in ("(", "[") and len(rounds) + len(squares) >= MOST_NESTED:
            raise UserError(f"prompt: its brackets are nested more than {MOST_NESTED} deep.")
        if token == "(":
            rounds.append(len(pieces))
        elif token == "[":
            squares.append(len(pieces))
        elif match.group("weight") is not None and rounds:
            multiply(rounds.pop(), float(match.group("weight")))
        elif token == ")" and rounds:
            multiply(rounds.pop(), _ROUND)
        elif token == "]" and squares:
            multiply(squares.pop(), _SQUARE)
        else:
            escaped = len(token) == 2 and token[0] == "\\"
            pieces.append((token[1] if escaped else token, 1.0))
    for opened, factor in ((rounds, _ROUND), (squares, _SQUARE)):
        for start in opened:
            multiply(start, factor)
    for text, weight in pieces:
        if not abs(weight) <= LARGEST:
            raise UserError(
                f"a prompt weight must lie between -{LARGEST:g} and {LARGEST:g}, not {weight:g}, "
                f"that of {text.strip()[:40]!r}."
            )
    return _joined(pieces)


def without_weights(prompt: str) -> str:
    """The text of a prompt, as `parse_weights` reads it.

    Raises:
        UserError: as `parse_weights`.
    """
    return "".join(text for text, _ in parse_weights(prompt))


def token_weights(
    pieces: Sequence[tuple[str, float]], spans: Sequence[tuple[int, int]]
) -> list[float]:
    """The weight of each token, out of the weights of pieces of text.

    The text is tokenized as a whole, so that weights never change the tokens. A token weighs the
    mean of its characters, spaces left out (some tokenizers count them to a word, some do not);
    marks weigh 1.

    Args:
        pieces: (text, weight) pairs, as of `parse_weights`.
        spans: for each token, its characters [start, end) in the joined text.
    """
    characters = [(letter, weight) for text, weight in pieces for letter in text]
    weights: list[float] = []
    for start, end in spans:
        inside = characters[start:end]
        seen = [weight for letter, weight in inside if not letter.isspace()]
        seen = seen or [weight for _, weight in inside] or [1.0]
        weights.append(sum(seen) / len(seen) if len(set(seen)) > 1 else seen[0])
    return weights


def emphasise(states: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Text states as far from those of the empty prompt as the weights say.

    empty + w (states - empty), place by place: 1 changes nothing, and 0 says nothing. So ComfyUI
    reads weights.

    Args:
        states: [P, L, D].
        empty: [L, D] of the empty prompt, place by place.
        weights: [P, L].

    Returns:
        [P, L, D].
    """
    return states + (weights[..., None] - 1) * (states - empty)


def multiply(states: Tensor, weights: Tensor) -> Tensor:
    """Text states times their weights, and all of a chunk by what restores its mean.

    w states mean(states) / mean(w states), both means over all tokens and channels of a chunk:
    so A1111 reads weights by default ("Original" in its `sd_emphasis.py`). It needs a mean away
    from 0, as in OpenAI's CLIP. In the bundled model it is -0.0004 beside a deviation of 0.76, and
    to double one word multiplies every state by 1.4.

    Args:
        states: [P, L, D] of P chunks, each within the window.
        weights: [P, L].

    Returns:
        [P, L, D].

    Raises:
        UserError: the mean of a chunk's weighted states is 0.
    """
    weighted = states * weights[..., None]
    factor = states.mean((1, 2), keepdim=True) / weighted.mean((1, 2), keepdim=True)
    if not bool(factor.isfinite().all()):
        raise UserError("these weights leave nothing whose mean A1111's rule can restore.")
    return weighted * factor


def weigh(states: Tensor, empty: Tensor, weights: Tensor, rule: WeightRule) -> Tensor:
    """Text states [P, L, D] with weights [P, L], by a rule: `emphasise` or `multiply`."""
    return emphasise(states, empty, weights) if rule == "comfyui" else multiply(states, weights)


def padded_weights(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """The weights of P prompts' tokens [P, L] for states [P, L, D]; those of padding are 1."""
    length = like.shape[1]
    return torch.tensor([[*row, *[1.0] * (length - len(row))] for row in rows]).to(like)


def _joined(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]


def window_states(tower: TextTower, prompts: Sequence[str], reading: Reading) -> TextStates:
    """The states of prompts within the window, with or without weights in them; a pooled vector
    has none.

    Raises:
        UserError: as `parse_weights` and `multiply`.
    """
    if reading.weights is None:
        return tower.encode(prompts, reading.clip_skip)
    pieces = [parse_weights(text) for text in prompts]
    plain = ["".join(part for part, _ in each) for each in pieces]
    encoded = tower.encode([*plain, ""], reading.clip_skip)
    weights = [
        token_weights(each, token_spans(tower, words))
        for each, words in zip(pieces, plain, strict=True)
    ]
    states, empty = encoded.states[:-1], encoded.states[-1]
    states = weigh(states, empty, padded_weights(weights, states), reading.weights)
    mask, pooled = (None if v is None else v[:-1] for v in (encoded.mask, encoded.pooled))
    return TextStates(states, mask, encoded.cut[:-1], pooled)

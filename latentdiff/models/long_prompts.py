"""Prompts longer than a text encoder's window, in chunks, as A1111 and ComfyUI read them.

Each chunk of at most window - 2 tokens gets its own start and end marks and goes through the
encoder by itself; the states of a prompt's chunks follow one another. The word BREAK ends a chunk.
"""

import re
from collections.abc import Sequence

import torch

from latentdiff.errors import UserError
from latentdiff.models.prompt_weights import (
    padded_weights,
    parse_weights,
    token_weights,
    weigh,
)
from latentdiff.models.text_encoders import (
    PLAIN,
    ClipTower,
    Reading,
    TextStates,
    TextTower,
    Tokens,
    encode_tokens,
    pad_tokens,
)

MOST_CHUNKS = 32
_AT_ONCE = 64  # chunks that go through the encoder in one batch

_BREAK = re.compile(r"\bBREAK\b")
Chunk = tuple[list[int], list[float]]  # ids, marks included, and their weights


def long_states(tower: TextTower, prompts: Sequence[str], reading: Reading = PLAIN) -> TextStates:
    """The states of prompts of any length [B, chunks * window, D]; nothing is cut.

    All prompts get as many chunks as the longest has; what is added are chunks of no words. A
    pooled vector is that of the first chunk, and has no weights.

    Args:
        tower: a CLIP text encoder.
        prompts: B texts.
        reading: whether weights in them are read, and the layers that are left out.

    Raises:
        UserError: another text encoder, a weight out of range, or more than 32 chunks.
    """
    tower, rows = _read(tower, prompts, reading)
    most = max(map(len, rows))
    (empty,) = _chunks(tower, "", False)
    flat = [chunk for row in rows for chunk in [*row, *[empty] * (most - len(row))]]
    ids, kept = pad_tokens([ids for ids, _ in [*flat, empty]], tower.window, tower.tokenizer)
    text = _in_parts(tower, Tokens(ids, kept, [""] * len(ids)), reading.clip_skip)
    states, nothing = text.states[:-1], text.states[-1]
    if reading.weights and any(weight != 1 for _, chunk in flat for weight in chunk):
        scale = padded_weights([chunk for _, chunk in flat], states)
        states = weigh(states, nothing, scale, reading.weights)
    states = states.unflatten(0, (len(rows), most)).flatten(1, 2)
    pooled = None if text.pooled is None else text.pooled[:-1:most]
    return TextStates(states, None, [""] * len(rows), pooled)


def most_chunks(tower: TextTower, prompts: Sequence[str], reading: Reading) -> int:
    """How many chunks the longest of these prompts has, which all of them get in one call.

    Raises:
        UserError: as `long_states`.
    """
    return max(map(len, _read(tower, prompts, reading)[1]))


def _read(
    tower: TextTower, prompts: Sequence[str], reading: Reading
) -> tuple[ClipTower, list[list[Chunk]]]:
    """The encoder, which is a CLIP, and the chunks of each prompt, which are not too many."""
    if not isinstance(tower, ClipTower):
        raise UserError("long_prompts: only CLIP text encoders read prompts in chunks.")
    rows = [_chunks(tower, prompt, reading.weights is not None) for prompt in prompts]
    most = max(map(len, rows))
    if most > MOST_CHUNKS:
        raise UserError(f"a prompt has {most} chunks of {tower.window - 2} tokens: say it shorter.")
    return tower, rows


def _in_parts(tower: ClipTower, tokens: Tokens, clip_skip: int) -> TextStates:
    """`tower.states`, of few chunks at once."""
    count = len(tokens.ids)
    if count <= _AT_ONCE:
        return tower.states(tokens, clip_skip)
    places = [range(count)[at : at + _AT_ONCE] for at in range(0, count, _AT_ONCE)]
    parts = [tower.states(tokens.take(part), clip_skip) for part in places]
    pooled = [part.pooled for part in parts if part.pooled is not None]
    states = torch.cat([part.states for part in parts])
    return TextStates(states, None, tokens.cut, torch.cat(pooled) if pooled else None)


def _chunks(tower: ClipTower, prompt: str, weights: bool) -> list[Chunk]:
    """The chunks of a prompt; one without words for a prompt without any."""
    inside = tower.window - 2
    chunks: list[Chunk] = []
    for pieces in _parts(parse_weights(prompt) if weights else [(prompt, 1.0)]):
        encoded = encode_tokens(tower.tokenizer, "".join(text for text, _ in pieces))
        start, *words, end = encoded
        scales = token_weights(pieces, [span for _, span in words])
        for at in range(0, max(len(words), 1), inside):
            ids = [start[0], *(token for token, _ in words[at : at + inside]), end[0]]
            chunks.append((ids, [1.0, *scales[at : at + inside], 1.0]))
    return chunks


def _parts(pieces: Sequence[tuple[str, float]]) -> list[list[tuple[str, float]]]:
    """Weighted pieces of text, parted where BREAK stands; brackets may reach across it."""
    parts: list[list[tuple[str, float]]] = [[]]
    for text, weight in pieces:
        first, *others = _BREAK.split(text)
        parts[-1].append((first, weight))
        parts += [[(other, weight)] for other in others]
    return parts

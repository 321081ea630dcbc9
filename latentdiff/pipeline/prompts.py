"""Prompts: checked, and encoded once each."""

import math
import re
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Condition
from latentdiff.errors import UserError
from latentdiff.models.text_encoders import TextStates, TextTower, token_spans
from latentdiff.pipeline.prompt_weights import (
    emphasise,
    has_weights,
    padded_weights,
    parse_weights,
    token_weights,
)

MAX_PROMPT = 10_000  # characters

Also = str | tuple[str, float]
"""A further prompt and its weight: ("a hat", 0.7) or "a hat:0.7"; "a hat" alone weighs 1."""


def check_prompts(given: str | Sequence[str], name: str = "prompt") -> list[str]:
    """The prompts as a list.

    Raises:
        UserError: one of them is empty (a negative one may be), too long, or no text.
    """
    if not isinstance(given, Iterable):
        raise UserError(f"{name}: must be text or a list of texts, not {type(given).__name__}.")
    prompts = [given] if isinstance(given, str) else list(given)
    if not prompts:
        raise UserError(f"{name}: the list is empty; say what to draw.")
    for text in prompts:
        if not isinstance(text, str):
            raise UserError(f"{name}: must be text, not {type(text).__name__}.")
        if name != "negative_prompt" and not text.strip():
            raise UserError(f"{name}: it is empty; say what to draw.")
        if len(text) > MAX_PROMPT:
            raise UserError(
                f"{name}: it has {len(text):,} characters; at most {MAX_PROMPT:,} are taken."
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{name}: it holds a half character (a lone surrogate), so no text.")
    return prompts


def check_negatives(given: str | Sequence[str] | None, count: int) -> list[str]:
    """One negative prompt for each of `count` prompts; by default the empty one.

    Raises:
        UserError: as `check_prompts`, or there are neither one nor `count` of them.
    """
    negatives = check_prompts("" if given is None else given, "negative_prompt")
    if len(negatives) not in (1, count):
        raise UserError(f"negative_prompt: {len(negatives)} were given for {count} prompts.")
    return negatives if len(negatives) == count else negatives * count


def check_also(also: Sequence[Also], guided: bool) -> tuple[list[str], list[float]]:
    """The further prompts, and the weight of each.

    Raises:
        UserError: as `check_prompts`; a weight is no finite number; or nothing guides, so that they
            would do nothing.
    """
    texts: list[str] = []
    weights: list[float] = []
    for one in also:
        if isinstance(one, str):
            check_prompts(one, "also")  # of a length that is quick to search
            match = re.fullmatch(r"(.*?)(?::\s*([+-]?(?:\d++\.?+\d*+|\.\d++))\s*)?", one, re.DOTALL)
            text, weight = match.groups(default="1") if match else (one, "1")
            if re.search(r":\s*+(?:[+-]?+[\d.,]++|nan|[+-]?+inf)\s*+$", text):
                raise UserError(f"also: {one!s:.40} ends in no number: 'a hat:0.7' is meant.")
        elif isinstance(one, Sequence) and len(one) == 2:
            text, weight = one
        else:
            raise UserError(f"also: give pairs of a prompt and its weight, not {one!s:.40}.")
        try:
            weights.append(float(weight))
        except (TypeError, ValueError):
            weights.append(math.nan)
        if not math.isfinite(weights[-1]):
            raise UserError(f"also: a weight must be a finite number, not {weight!s:.40}.")
        texts += check_prompts(text, "also")
    if texts and not guided:
        raise UserError("also: further prompts act through guidance: guidance_scale must not be 1.")
    return texts, weights


def encode_prompts(
    tower: TextTower,
    prompts: list[str],
    negatives: list[str] | None,
    per_prompt: int,
    *,
    weights: bool = False,
    also: Sequence[str] = (),
) -> tuple[list[Condition], list[str]]:
    """Text states for every picture: each different text is encoded once, all in one batch.

    Args:
        tower: of the model.
        prompts: P texts.
        negatives: P texts, or None where nothing guides.
        per_prompt: how many pictures of each prompt; they follow one another.
        weights: read weights in the texts, as `pipeline.prompt_weights.parse_weights` does.
        also: further texts, each for every picture.

    Returns:
        The condition of the prompts, then of the negatives, then of each further text, each for
        P * per_prompt pictures; and of each picture's prompt, the part beyond the tower's window,
        of which the caller of the pipeline is warned.

    Raises:
        UserError: a weight out of range, or a prompt of weights alone.
    """
    rows = [prompts] if negatives is None else [prompts, negatives]
    rows += [[text] * len(prompts) for text in also]
    texts = list(dict.fromkeys(text for row in rows for text in row))
    if weights:
        encoded = _encode_weighted(tower, texts, needed={*prompts, *also})
    else:
        encoded = tower.encode(texts)
        if any(map(has_weights, texts)):
            warnings.warn(
                "a prompt holds (text:number), which is read as plain words; "
                "prompt_weights=True (--weights) reads it as a weight",
                stacklevel=4,
            )
    for text, lost in zip(texts, encoded.cut, strict=True):
        if lost:
            warnings.warn(
                f"the prompt {text[:40]!r}... is longer than the model's window of "
                f"{tower.window} tokens; not used: {lost!r}",
                stacklevel=4,
            )
    conditions: list[Condition] = []
    for row in rows:
        places = [texts.index(text) for text in row for _ in range(per_prompt)]
        condition = {"states": encoded.states[places]}
        if encoded.mask is not None:
            condition["mask"] = encoded.mask[places]
        conditions.append(condition)
    return conditions, [encoded.cut[texts.index(t)] for t in prompts for _ in range(per_prompt)]


def _encode_weighted(tower: TextTower, texts: list[str], needed: set[str]) -> TextStates:
    """The states of texts with weights in them; those that are needed hold more than weights."""
    pieces = [parse_weights(text) for text in texts]
    plain = ["".join(part for part, _ in each) for each in pieces]
    for text, words in zip(texts, plain, strict=True):
        if text in needed and not words.strip():
            raise UserError(f"prompt: {text[:40]!r} holds weights but no words; say what to draw.")
    encoded = tower.encode([*plain, ""])
    weights = [
        token_weights(each, token_spans(tower, words))
        for each, words in zip(pieces, plain, strict=True)
    ]
    states, empty = encoded.states[:-1], encoded.states[-1]
    states = emphasise(states, empty, padded_weights(weights, states))
    return TextStates(states, None if encoded.mask is None else encoded.mask[:-1], encoded.cut[:-1])


def seeing(
    conditions: list[Condition], seen: Tensor | None
) -> tuple[Condition, Condition | None, Condition | None]:
    """The positive condition; the negative one, if there is; and this without what is seen."""
    positive, negative = conditions[0], conditions[1] if len(conditions) > 1 else None
    if seen is None:
        return positive, negative, None
    positive = {**positive, "beside": seen}
    if negative is None:
        return positive, None, None
    blind = {**negative, "beside": torch.zeros_like(seen)}
    return positive, {**negative, "beside": seen}, blind

"""Prompts: checked, and encoded once each."""

import math
import re
from collections.abc import Iterable, Sequence

from latentdiff.diffusion.condition import Condition
from latentdiff.errors import UserError, warn
from latentdiff.models.conditioner import Conditioner
from latentdiff.models.prompt_weights import has_weights, without_weights

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


def check_also(also: Sequence[Also]) -> tuple[list[str], list[float]]:
    """The further prompts, and the weight of each.

    Raises:
        UserError: as `check_prompts`, or a weight is no finite number.
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
    return texts, weights


def encode_prompts(
    conditioner: Conditioner,
    rows: Sequence[Sequence[str]],
    per_prompt: int,
    size: tuple[int, int],
    *,
    weights: bool = False,
    long: bool = False,
) -> tuple[list[Condition], list[str]]:
    """Encode every different text once, all in one batch.

    Args:
        conditioner: the conditioner of the model.
        rows: lists of P texts: the prompts, perhaps their negatives, further ones.
        per_prompt: number of pictures of each prompt; they follow one another.
        size: height and width of the pictures.
        weights: read weights in the texts, as `models.prompt_weights.parse_weights` does.
        long: read texts beyond the window, too, as `models.long_prompts` does.

    Returns:
        The condition of each row for P * per_prompt pictures; and of each picture's prompt, the
        part beyond the model's window, of which the caller of the pipeline is warned.

    Raises:
        UserError: a weight out of range.
    """
    texts = list(dict.fromkeys(text for row in rows for text in row))
    encoded = conditioner.encode(texts, size, weights=weights, long=long)
    if not weights and any(map(has_weights, texts)):
        warn(
            "a prompt holds (text:number), which is read as plain words; "
            "prompt_weights=True (--weights) reads it as a weight"
        )
    for text, lost in zip(texts, encoded.cut, strict=True):
        if lost:
            warn(
                f"the prompt {text[:40]!r}... is longer than the model's window of "
                f"{conditioner.window} tokens; not used: {lost!r} (long_prompts=True, --long, "
                "reads all of it)"
            )
    conditions = [
        encoded.condition.take([texts.index(text) for text in row for _ in range(per_prompt)])
        for row in rows
    ]
    return conditions, [encoded.cut[texts.index(t)] for t in rows[0] for _ in range(per_prompt)]


def check_words(texts: Sequence[str]) -> None:
    """Pass if each text, read with weights, holds more than weights.

    Raises:
        UserError: a text holds nothing but weights.
    """
    for text in texts:
        if not without_weights(text).strip():
            raise UserError(f"prompt: {text[:40]!r} holds weights but no words; say what to draw.")

"""Prompts: checked, and encoded once each."""

import warnings
from collections.abc import Sequence

from latentdiff.denoiser import Condition
from latentdiff.errors import UserError
from latentdiff.text import TextTower

MAX_PROMPT = 10_000  # characters


def check_prompts(given: str | Sequence[str], name: str = "prompt") -> list[str]:
    """The prompts as a list.

    Raises:
        UserError: one of them is empty (a negative one may be), too long, or no text.
    """
    prompts = [given] if isinstance(given, str) else list(given)
    if not prompts:
        raise UserError(f"{name}: the list is empty; say what to draw.")
    for text in prompts:
        if not isinstance(text, str):
            raise UserError(f"{name}: must be text, not {type(text).__name__}.")
        if name == "prompt" and not text.strip():
            raise UserError("prompt: it is empty; say what to draw.")
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


def encode_prompts(
    tower: TextTower, prompts: list[str], negatives: list[str] | None, per_prompt: int
) -> tuple[list[Condition], list[str]]:
    """Text states for every picture: each different text is encoded once, all in one batch.

    Args:
        tower: of the model.
        prompts: P texts.
        negatives: P texts, or None where nothing guides.
        per_prompt: how many pictures of each prompt; they follow one another.

    Returns:
        The condition of the prompts, then of the negatives, each for P * per_prompt pictures; and
        of each picture's prompt, the part beyond the tower's window, of which the caller of the
        pipeline is warned.
    """
    rows = [prompts] if negatives is None else [prompts, negatives]
    texts = list(dict.fromkeys(text for row in rows for text in row))
    encoded = tower.encode(texts)
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

"""Prompts: checked, and encoded once each."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from latentdiff.diffusion.condition import Condition
from latentdiff.editing import RunContext, box_mask
from latentdiff.editing.masks import mask_tensor, open_mask
from latentdiff.errors import UserError, warn
from latentdiff.models.conditioner import Conditioner
from latentdiff.models.long_prompts import most_chunks
from latentdiff.models.prompt_weights import has_weights, without_weights
from latentdiff.models.text_encoders import PLAIN, ClipTower, Reading
from latentdiff.pictures import Picture

MAX_PROMPT = 10_000  # characters
MOST_WINDOWS = 2048  # of text that one run holds: 1.3 GB of Stable Diffusion XL's states
_MASKS = (str, Path, bytes, Image.Image)

Also = str | tuple[str, float] | tuple[str, Picture] | tuple[str, float, Picture]
"""A further prompt and its weight: ("a hat", 0.7) or "a hat:0.7"; "a hat" alone weighs 1. With a
mask, ("a hat", mask) or ("a hat", 0.7, mask), it weighs that where the mask is white, and nothing
where it is black: a picture of the shape of those drawn, or "box:x0,y0,x1,y1" in their pixels."""


@dataclass(frozen=True)
class Further:
    """A further prompt, checked.

    Attributes:
        text: what it says.
        weight: beside the prompt's 1.
        place: where it weighs that: None everywhere; a mask in mode L; or "box:...".
    """

    text: str
    weight: float = 1.0
    place: Image.Image | str | None = None


def check_prompts(
    given: str | Sequence[str], name: str = "prompt", *, needed: bool = True
) -> list[str]:
    """The prompts as a list.

    Args:
        needed: whether they must say something, as a negative one need not.

    Raises:
        UserError: one of them is empty, too long, or no text.
    """
    if not isinstance(given, Iterable):
        raise UserError(f"{name}: must be text or a list of texts, not {type(given).__name__}.")
    prompts = [given] if isinstance(given, str) else list(given)
    if not prompts:
        raise UserError(f"{name}: the list is empty; say what to draw.")
    for text in prompts:
        if not isinstance(text, str):
            raise UserError(f"{name}: must be text, not {type(text).__name__}.")
        if needed and not text.strip():
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
    negatives = check_prompts("" if given is None else given, "negative_prompt", needed=False)
    if len(negatives) not in (1, count):
        raise UserError(f"negative_prompt: {len(negatives)} were given for {count} prompts.")
    return negatives if len(negatives) == count else negatives * count


def check_also(also: Sequence[Also]) -> list[Further]:
    """The further prompts.

    Raises:
        UserError: as `check_prompts`, a weight is no finite number, or a mask no picture.
    """
    return [_from_text(one) if isinstance(one, str) else _from_parts(one) for one in also]


def _from_text(text: str) -> Further:
    check_prompts(text, "also")  # of a length that is quick to search
    match = re.fullmatch(r"(.*?)(?::\s*([+-]?(?:\d++\.?+\d*+|\.\d++))\s*)?", text, re.DOTALL)
    words, weight = match.groups(default="1") if match else (text, "1")
    if re.search(r":\s*+(?:[+-]?+[\d.,]++|nan|[+-]?+inf)\s*+$", words):
        raise UserError(f"also: {text!s:.40} ends in no number: 'a hat:0.7' is meant.")
    check_prompts(words, "also")
    return Further(words, _weight(weight))


def _from_parts(parts: Sequence[object]) -> Further:
    if not isinstance(parts, Sequence) or len(parts) not in (2, 3):
        raise UserError(f"also: give pairs of a prompt and its weight, not {parts!s:.40}.")
    text, *rest = parts
    (words,) = check_prompts(text, "also")  # pyright: ignore[reportArgumentType]  (checked there)
    place = rest.pop() if len(rest) == 2 or _is_place(rest[0]) else None
    weight = _weight(rest[0] if rest else 1.0)
    if isinstance(place, str) and place.startswith("box:"):
        return Further(words, weight, place)
    if place is not None and not isinstance(place, _MASKS):
        raise UserError(f"also: a place is a mask or 'box:x0,y0,x1,y1', not {place!s:.40}.")
    return Further(words, weight, None if place is None else open_mask(place))


def _is_place(given: object) -> bool:
    if not isinstance(given, str):
        return isinstance(given, _MASKS)
    try:
        float(given)
    except ValueError:
        return True
    return False


def _weight(given: object) -> float:
    try:
        weight = float(given)  # pyright: ignore[reportArgumentType]  (what is no number is refused)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"also: a weight must be a finite number, not {given!s:.40}.")
    return weight


def read_region(text: str) -> tuple[str, float, str]:
    """Read "a cat@mask.png" or "a cat:0.7@box:0,0,32,64" for `also`.

    Raises:
        UserError: there is no place, or as `check_also`.
    """
    words, _, place = text.rpartition("@")
    if not words or not place:
        raise UserError(f"--region reads TEXT@MASK, as 'a cat@mask.png', not {text!r:.60}.")
    further = _from_text(words)
    return further.text, further.weight, place


def place_weight(further: Further, context: RunContext) -> float | Tensor:
    """The weight of a further prompt; where it has a place, [1, 1, *padded] of the run.

    Raises:
        UserError: the mask is of another shape, or the box holds no pixel.
    """
    place, (height, width) = further.place, (context.height, context.width)
    if place is None:
        return further.weight
    if isinstance(place, str):
        place = box_mask(place.removeprefix("box:"), (width, height))
    if abs(place.height * width / place.width - height) > max(1, height / 50):
        raise UserError(
            f"also: a mask of {place.width} x {place.height} pixels has not the shape of the "
            f"picture, {width} x {height}."
        )
    resized = place.resize((width, height), Image.Resampling.BOX)
    return further.weight * context.pad(mask_tensor(resized))


def encode_prompts(
    conditioner: Conditioner,
    rows: Sequence[Sequence[str]],
    per_prompt: int,
    size: tuple[int, int],
    reading: Reading = PLAIN,
) -> tuple[list[Condition], list[str]]:
    """Encode every different text once; rows of the same texts share their tensors.

    Args:
        conditioner: the conditioner of the model.
        rows: lists of P texts: the prompts, perhaps their negatives, further ones.
        per_prompt: number of pictures of each prompt; they follow one another.
        size: height and width of the pictures.
        reading: how the texts are read.

    Returns:
        The condition of each row for P * per_prompt pictures; and of each picture's prompt, the
        part beyond the model's window, of which the caller of the pipeline is warned.

    Raises:
        UserError: a weight out of range, or long texts that make more states than are held.
    """
    texts = list(dict.fromkeys(text for row in rows for text in row))
    different = list(dict.fromkeys(map(tuple, rows)))
    if reading.long:
        _check_held(conditioner, texts, sum(map(len, different)) * per_prompt, reading)
    encoded = conditioner.encode(texts, size, reading)
    if not reading.weights and any(map(has_weights, texts)):
        warn(
            "a prompt holds (text:number), which is read as plain words; "
            "prompt_weights=True (--weights) reads it as a weight"
        )
    clips = all(isinstance(tower, ClipTower) for tower in conditioner.towers.values())
    more = " (long_prompts=True, --long, reads all of it)" if clips else ""
    for text, lost in zip(texts, encoded.cut, strict=True):
        if lost:
            warn(
                f"the prompt {text[:40]!r}... is longer than the model's window of "
                f"{conditioner.window} tokens; not used: {lost!r}{more}"
            )
    place = {text: number for number, text in enumerate(texts)}
    shared = {
        row: encoded.condition.take([place[text] for text in row for _ in range(per_prompt)])
        for row in different
    }
    ends = [encoded.cut[place[text]] for text in rows[0] for _ in range(per_prompt)]
    # one value for each row, for a run tells its branches apart by them; their tensors are shared
    return [replace(shared[tuple(row)]) for row in rows], ends


def _check_held(
    conditioner: Conditioner, texts: Sequence[str], held: int, reading: Reading
) -> None:
    """Pass if long texts make no more states than one run may hold, before they are made.

    Args:
        conditioner: the conditioner of the model.
        texts: the different texts; each gets as many windows as the longest has.
        held: texts of all pictures in all different rows, by which the states are held.
        reading: how they are read.

    Raises:
        UserError: they make more.
    """
    most = max(most_chunks(tower, texts, reading) for tower in conditioner.towers.values())
    if held * most > MOST_WINDOWS:
        raise UserError(
            f"prompt: {texts[0][:40]!r} and what goes with it are {held} texts of {most} windows, "
            f"together more than {MOST_WINDOWS:,}: say it shorter, let it change less often, or "
            "draw fewer pictures at once."
        )


def check_words(texts: Sequence[Iterable[str]]) -> None:
    """Pass if each text, read with weights, holds more than weights at one step at least.

    Args:
        texts: what each says, step by step.

    Raises:
        UserError: a text holds nothing but weights.
    """
    for steps in texts:
        empty: set[str] = set()
        for text in steps:
            if text not in empty and without_weights(text).strip():
                break
            empty.add(text)
        else:
            told = f"{min(empty, default='')[:40]!r} holds weights but no words"
            raise UserError(f"prompt: {told}; say what to draw.")

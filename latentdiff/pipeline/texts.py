"""The texts of a request: checked, taken apart, and encoded for each step of a run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

from latentdiff import lora
from latentdiff.bundle import Bundle
from latentdiff.diffusion.condition import Condition
from latentdiff.editing import Enlarge, RunContext
from latentdiff.errors import UserError, warn
from latentdiff.models.conditioner import SizeConditions
from latentdiff.models.prompt_weights import without_weights
from latentdiff.pipeline.arguments import MAX_PIXELS, listed, whole
from latentdiff.pipeline.prompt_syntax import (
    Parsed,
    Syntax,
    Words,
    holds_tags,
    parse,
    plain,
    schedule,
    without_tags,
)
from latentdiff.pipeline.prompts import (
    Further,
    check_also,
    check_negatives,
    check_prompts,
    check_words,
    encode_prompts,
    place_weight,
)
from latentdiff.pipeline.request import Request
from latentdiff.registry import check_name


@dataclass(frozen=True)
class Texts:
    """The texts of a request, before they are encoded.

    Attributes:
        prompts: P prompts; "" for each where ready-made conditions were given.
        negatives: P texts.
        further: the composed prompts of `also`.
        per_prompt: number of pictures per prompt.
    """

    prompts: list[Parsed]
    negatives: list[Words]
    further: list[tuple[Words, Further]]
    per_prompt: int

    @property
    def pictures(self) -> int:
        return len(self.prompts) * self.per_prompt

    def said(self, request: Request) -> list[str]:
        """What each picture is to show at the end, in plain words, for guides of other models."""
        steps, reading = request.num_inference_steps, request.reading
        ends = [prompt.parts[0][0].at(steps, steps) for prompt in self.prompts]
        if reading.weights:
            ends = [without_weights(text) for text in ends]
        if reading.long:
            ends = [re.sub(r"\bBREAK\b", " ", text) for text in ends]
        return [text for text in ends for _ in range(self.per_prompt)]

    def rows(self) -> list[list[tuple[Words, float]]]:
        """Lists of P texts with their weights: the prompts, and what AND joins to them.

        Where AND joins less to a prompt than to another one, it stands there itself with weight 0.
        """
        most = max(len(prompt.parts) for prompt in self.prompts)
        filled = [
            [*parts, *[(parts[0][0], 0.0)] * (most - len(parts))]
            for parts in (prompt.parts for prompt in self.prompts)
        ]
        return [[parts[place] for parts in filled] for place in range(most)]


@dataclass(frozen=True)
class Conditions:
    """What the pictures of a run are denoised under, for each stretch of moves of the same texts.

    Attributes:
        positive: one for each stretch.
        negative: likewise; none where none is needed.
        blind: the negative ones without the picture of InstructPix2Pix; none without one.
        further: of the further prompts, one for each stretch.
        weights: of the prompt and of each further one, a tensor where pictures or places differ.
        stretches: for each move, the number of its stretch.
        cut: of each picture's prompt, the part beyond the window.
    """

    positive: list[Condition]
    negative: list[Condition]
    further: list[list[Condition]]
    weights: list[float | Tensor]
    stretches: list[int]
    cut: list[str]
    blind: list[Condition] = field(default_factory=list)

    @property
    def composed(self) -> bool:
        """Whether there is more than one prompt of weight 1."""
        first = self.weights[0]
        return bool(self.further) or isinstance(first, Tensor) or first != 1

    def series(self) -> list[list[Condition]]:
        """The conditions of each branch."""
        return [one for one in (self.positive, self.negative, self.blind, *self.further) if one]

    def with_fields(self, toward: Mapping[str, Any], away: Mapping[str, Any]) -> "Conditions":
        """The same with other fields of the conditions to be led to, and of those led away from."""

        def told(series: list[Condition], values: Mapping[str, Any]) -> list[Condition]:
            return [replace(condition, **values) for condition in series]

        return replace(
            self,
            positive=told(self.positive, toward),
            negative=told(self.negative, away),
            blind=told(self.blind, away),
            further=[told(series, toward) for series in self.further],
        )


def texts_of(request: Request) -> Texts:
    """The texts of a call, checked and taken apart.

    Raises:
        UserError: there are none, too many, or some that cannot be read.
    """
    if (request.prompt is None) == (request.prompt_embeds is None):
        raise UserError("prompt: give a prompt, or prompt_embeds, and not both.")
    if request.negative_prompt is not None and request.negative_prompt_embeds is not None:
        raise UserError("negative_prompt: give it or negative_prompt_embeds, not both.")
    check_name("prompt syntax", request.prompt_syntax, get_args(Syntax))
    if request.clip_skip is not None:
        whole(request.clip_skip, "clip_skip", 0, 100)
    if request.prompt is not None:
        shows = any(isinstance(edit, Enlarge) for edit in request.edits)
        prompts = check_prompts(request.prompt, needed=not shows)
    else:
        prompts = [""] * condition_rows(request.prompt_embeds, "prompt_embeds")
    per_prompt = whole(request.num_images_per_prompt, "num_images_per_prompt", 1, MAX_PIXELS)
    listed(request.also, "also", "('a hat', 0.7)")
    further = check_also(request.also)
    negatives = check_negatives(request.negative_prompt, len(prompts))
    theirs = request.prompt_syntax == "a1111"
    if not theirs and holds_tags(prompts):
        warn(
            "a prompt holds <lora:...>, which is read as plain words; prompt_syntax='a1111' "
            "(--syntax a1111) reads it"
        )
    parsed = [parse(text) if theirs and text else Parsed([(plain(text), 1.0)]) for text in prompts]
    read = _changing if theirs else plain
    composed = [(read(one.text), one) for one in further]
    texts = Texts(parsed, [*map(read, negatives)], composed, per_prompt)
    if request.reading.weights:
        steps = whole(request.num_inference_steps, "num_inference_steps", 1, 1000)
        shown = [words for words, _ in composed]
        if request.prompt is not None:
            shown += [words for prompt in parsed for words, _ in prompt.parts]
        check_words([(words.at(step, steps) for step in range(1, steps + 1)) for words in shown])
    return texts


def _changing(text: str) -> Words:
    """A negative or further prompt in A1111's syntax."""
    if without_tags(text)[1]:
        raise UserError("negative_prompt, also: <lora:NAME:0.8> belongs into the prompt.")
    return schedule(text)


def check_loras(texts: Texts, bundle: Bundle) -> None:
    """Pass if the LoRAs that prompts name are in the model at these scales.

    Raises:
        UserError: one is not.
    """
    named = [pair for prompt in texts.prompts for pair in prompt.loras.items()]
    there = lora.lora_scales(bundle) if named else {}
    for name, scale in named:
        known = lora.name_of(name)
        if there.get(known) != scale:
            how = f"it is there at {there[known]:g}" if known in there else "it is not in the model"
            raise UserError(
                f"<lora:{name:.80}:{scale:g}>: {how}. A LoRA is a property of the model: load_lora "
                "and set_loras put it there before the call; on the command line --lora or "
                "--lora-dir says where it is."
            )


def condition_rows(given: Tensor | Condition | None, name: str) -> int:
    """The number of rows of ready-made states [P, L, D], or of a condition with states.

    Raises:
        UserError: there are none.
    """
    states = given.states if isinstance(given, Condition) else given
    fits = isinstance(states, Tensor) and states.is_floating_point() and states.ndim == 3
    if states is None or not fits or not states.numel():
        raise UserError(f"{name}: give states [P, L, D], or a Condition that holds some.")
    return len(states)


def encoded(
    bundle: Bundle,
    request: Request,
    texts: Texts,
    context: RunContext,
    *,
    guided: bool,
    moves: int,
) -> Conditions:
    """Encode the texts of a run, every different one once, before the first step.

    Args:
        bundle: the model.
        request: the call.
        texts: its texts.
        context: of the run.
        guided: whether guidance asks for the negative condition.
        moves: number of moves of the run, at least 1.
    """
    own = texts.rows()
    weights = [_weight([each for _, each in row], texts.per_prompt, bundle.device) for row in own]
    weights += [place_weight(one, context) for _, one in texts.further]
    rows = [[words for words, _ in row] for row in own]
    rows += [[words] * len(texts.prompts) for words, _ in texts.further]
    size = context.padded
    composed = len(rows) > 1 or isinstance(weights[0], Tensor) or weights[0] != 1
    ready, away = request.prompt_embeds, request.negative_prompt_embeds
    if (guided or composed) and away is None:
        rows.append(texts.negatives)
    told: dict[int, list[str]] = {}  # of each text, what it says in each move
    for words in (words for row in rows for words in row):
        if id(words) not in told:
            told[id(words)] = words.texts(max(moves, 1))
    stretches: list[int] = []
    known: dict[tuple[str, ...], int] = {}
    for move in range(max(moves, 1)):
        said = tuple(told[id(words)][move] for row in rows for words in row)
        stretches.append(known.setdefault(said, len(known)))
    count = len(texts.prompts)
    asked = [
        list(said[at : at + count])
        for said in known
        for at in range(0 if ready is None else count, len(said), count)
    ]
    conditions: list[Condition] = []
    cut = [""] * texts.pictures
    if asked:
        conditions, ends = encode_prompts(
            bundle.conditioner, asked, texts.per_prompt, size, request.reading
        )
        cut = cut if ready is not None else ends
    # the conditions of a row, one for each stretch
    every = len(asked) // len(known)
    series = [conditions[row::every] for row in range(every)]
    if ready is not None:
        series.insert(0, [_ready(ready, texts, bundle, "prompt_embeds")] * len(known))
    if away is not None:
        negative = [_ready(away, texts, bundle, "negative_prompt_embeds")] * len(known)
    else:
        negative = series.pop() if guided or composed else []
    given = series[0][0].sizes if ready is not None else None
    positive = [_sized(bundle, request, each, size, ready, given) for each in series[0]]
    further = [
        [_sized(bundle, request, each, size, None, given) for each in one] for one in series[1:]
    ]
    negative = [
        _sized(bundle, request, each, size, away, given, negative=True) for each in negative
    ]
    return Conditions(positive, negative, further, weights, stretches, cut)


def _sized(
    bundle: Bundle,
    request: Request,
    condition: Condition,
    size: tuple[int, int],
    given: Tensor | Condition | None,
    sizes: Tensor | None,
    *,
    negative: bool = False,
) -> Condition:
    """The condition with the sizes of the call, unless it was given with its own.

    Args:
        bundle: the model.
        request: the call.
        condition: of B pictures.
        size: height and width of the pictures.
        given: what was given ready-made for it, if anything.
        sizes: those that were given with the prompt's condition [B, n], if any: then of the other
            conditions, too, but for what is always another of a negative one, a refiner's score.
        negative: whether guidance leads away from it.

    Raises:
        UserError: the network is not told them, or both were given.
    """
    own = isinstance(given, Condition) and given.sizes is not None
    if own or sizes is not None:
        for name in request.sizes.given():
            raise UserError(f"{name}: the ready-made condition holds sizes; leave one of them out.")
    if own:
        return condition
    told = bundle.conditioner.sized(condition, size, request.sizes, negative=negative)
    if sizes is None:
        return told
    usual = bundle.conditioner.sized(condition, size, request.sizes).sizes
    assert told.sizes is not None
    assert usual is not None
    return replace(told, sizes=torch.where(told.sizes == usual, sizes.to(usual), told.sizes))


def _weight(row: Sequence[float], per_prompt: int, device: torch.device) -> float | Tensor:
    """A weight for all pictures, or one for each [B, 1, 1, 1]."""
    if len(set(row)) == 1:
        return row[0]
    values = [weight for weight in row for _ in range(per_prompt)]
    return torch.tensor(values, device=device)[:, None, None, None]


def _ready(given: Tensor | Condition, texts: Texts, bundle: Bundle, name: str) -> Condition:
    """A ready-made condition of P rows, or of one, for every picture.

    Raises:
        UserError: another number of rows, states of another width or not finite, a mask that does
            not fit them, or a pooled vector or sizes that the network is not told so.
    """
    rows, wanted = condition_rows(given, name), len(texts.prompts)
    condition = given if isinstance(given, Condition) else Condition(states=given)
    if rows not in (1, wanted):
        raise UserError(f"{name}: {rows} rows were given for {wanted} prompts.")
    assert condition.states is not None
    if condition.states.shape[2] != bundle.network.width:
        raise UserError(
            f"{name}: the model attends to states of width {bundle.network.width}, not "
            f"{condition.states.shape[2]}."
        )
    if not bool(torch.isfinite(condition.states).all()):
        raise UserError(f"{name}: they hold NaN or infinity.")
    mask, shape = condition.mask, condition.states.shape[:2]
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        raise UserError(
            f"{name}: its mask must be bool {list(shape)}, not {mask.dtype} {list(mask.shape)}."
        )
    if any(len(value) != rows for value in condition.given().values()):
        raise UserError(f"{name}: its fields must all have {rows} rows, as its states have.")
    _check_pooled(condition.pooled, bundle.conditioner.pooled_width, name)
    _check_sizes(condition, bundle, name)
    moved = {key: value.to(bundle.device) for key, value in condition.given().items()}
    condition = replace(condition, **moved)
    places = range(wanted) if rows == wanted else [0] * wanted
    return condition.take([row for row in places for _ in range(texts.per_prompt)])


def _check_pooled(pooled: Tensor | None, width: int | None, name: str) -> None:
    """Check that a ready-made condition has a pooled vector where the network is told one.

    Raises:
        UserError: it has none, or one that nothing is told; or it is of another width, or not
            finite.
    """
    if width is None and pooled is not None:
        raise UserError(f"{name}: this model is told no pooled text; leave it out.")
    if width is None:
        return
    if pooled is None or pooled.ndim != 2 or pooled.shape[1] != width:
        raise UserError(
            f"{name}: this model is also told a pooled text: give Condition(states=..., "
            f"pooled=...), pooled [P, {width}]."
        )
    if not bool(torch.isfinite(pooled).all()):
        raise UserError(f"{name}: they hold NaN or infinity.")


def _check_sizes(condition: Condition, bundle: Bundle, name: str) -> None:
    """Check that the sizes of a ready-made condition, if it has any, are as the network's.

    Raises:
        UserError: the network is told none, or others; or they are not finite.
    """
    sizes = condition.sizes
    if sizes is None:
        return
    usual = bundle.conditioner.sized(
        replace(condition, sizes=None), bundle.size, SizeConditions()
    ).sizes
    if usual is None:
        raise UserError(f"{name}: this model is told no sizes; leave them out.")
    if sizes.shape != usual.shape or not bool(torch.isfinite(sizes).all()):
        raise UserError(
            f"{name}: its sizes must be {list(usual.shape)} finite numbers, not a tensor "
            f"{list(sizes.shape)} of others."
        )

"""Prompts as they are written for A1111's web UI; `docs/prompts.md` has the grammar and examples.

A prompt is taken apart in this order: `<lora:NAME:SCALE>` is taken out of it, AND parts it into
prompts with weights of their own, and square brackets change the words of a part from step to step.
What is left, weights of words and BREAK, is read where texts are encoded. Every text is read in
time proportional to its length.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Union

from latentdiff.errors import UserError

Syntax = Literal["plain", "a1111"]

MOST_TEXTS = 32  # that one run may encode for one prompt

_NUMBER = r"[+-]?(?:\d++\.?+\d*+|\.\d++)"
_WHEN = re.compile(rf"\s*+({_NUMBER})\s*+")
_TAG = re.compile(r"<(\w++):([^<>]++)>")
_KINDS = ("lora", "lyco")
_TOKEN = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]++|\\", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`[before:after:when]`: `before` up to a step, then `after`."""

    before: "Nodes"
    after: "Nodes"
    when: str

    def last(self, steps: int) -> int:
        """The last step of `before`, of steps 1 .. `steps`; a number with a point is a share."""
        number = float(self.when) * (steps if "." in self.when else 1)
        return int(max(0.0, min(steps, number)))


@dataclass(frozen=True, slots=True)
class Alternating:
    """`[a|b|c]`: one after the other, a step each."""

    options: "Sequence[Nodes]"


Node = Union[str, "Nodes", Scheduled, Alternating]
Nodes = list[Node]


@dataclass(frozen=True, slots=True)
class Words:
    """A text that may change from step to step."""

    nodes: Nodes

    def at(self, step: int, steps: int) -> str:
        """The text of a step, 1 .. `steps`."""
        said: list[str] = []
        waiting: Nodes = [self.nodes]
        while waiting:
            match node := waiting.pop():
                case str():
                    said.append(node)
                case Scheduled():
                    waiting.append(node.before if step <= node.last(steps) else node.after)
                case Alternating():
                    waiting.append(node.options[(step - 1) % len(node.options)])
                case _:
                    waiting += reversed(node)
        return "".join(said)

    def texts(self, steps: int) -> list[str]:
        """The texts of all steps.

        Raises:
            UserError: they are too many different ones.
        """
        if all(isinstance(node, str) for node in self.nodes):
            return [self.at(1, steps)] * steps
        texts: list[str] = []
        for step in range(1, steps + 1):
            texts.append(self.at(step, steps))
            if len(set(texts)) > MOST_TEXTS:
                raise UserError(
                    f"prompt: its brackets make more than {MOST_TEXTS} different texts of it, each "
                    f"of which is encoded: let it change less often."
                )
        return texts


@dataclass(frozen=True, slots=True)
class Parsed:
    """A prompt, taken apart.

    Attributes:
        parts: the prompts that AND joins, each with its weight.
        loras: the names in `<lora:NAME:SCALE>`, with their scales.
    """

    parts: list[tuple[Words, float]]
    loras: dict[str, float] = field(default_factory=dict)


def holds_tags(prompts: Sequence[str]) -> bool:
    """Whether a prompt names a LoRA as A1111 does."""
    return any(tag[1] in _KINDS for prompt in prompts for tag in _TAG.finditer(prompt))


def plain(text: str) -> Words:
    """A text that says what it says."""
    return Words([text])


def parse(prompt: str) -> Parsed:
    """Take a prompt apart.

    Raises:
        UserError: there are no words before or after an AND, or a `<...:...>` that is none of ours.
    """
    text, loras = without_tags(prompt)
    parts: list[tuple[Words, float]] = []
    for part in re.split(r"\bAND\b", text):
        words, colon, number = part.rpartition(":")
        weighted = bool(colon) and _WHEN.fullmatch(number) is not None
        weight = float(number) if weighted else 1.0
        if not math.isfinite(weight):
            raise UserError(f"prompt: {number.strip():.40} is too large for a weight.")
        words = words if weighted else part
        if not words.strip():
            raise UserError(f"prompt: {prompt.strip()[:40]!r} has a part without words.")
        parts.append((schedule(words), weight))
    return Parsed(parts, loras)


def without_tags(prompt: str) -> tuple[str, dict[str, float]]:
    """A prompt without its `<lora:NAME:SCALE>`, and their scales by name.

    Raises:
        UserError: another `<...:...>`, a scale that is no number or two for one name.
    """
    loras: dict[str, float] = {}

    def take(tag: re.Match[str]) -> str:
        kind, (name, *scales) = tag[1], tag[2].split(":")
        numbers = [float(s) for s in scales or ["1"] if re.fullmatch(_NUMBER, s.strip())]
        one = len(set(numbers)) == 1 and len(numbers) == max(1, len(scales)) <= 2
        if kind not in _KINDS or not one or not math.isfinite(numbers[0]):
            raise UserError(f"prompt: {tag[0][:80]} is not to be had; <lora:NAME:0.8> is read.")
        if loras.setdefault(name, numbers[0]) != numbers[0]:
            raise UserError(f"prompt: it names the LoRA {name[:80]!r} twice, at two scales.")
        return ""

    return _TAG.sub(take, prompt), loras


@dataclass(slots=True)
class _Open:
    """A bracket that is not closed yet: what stands in it, between colons and bars."""

    bracket: str
    parts: list[Nodes] = field(default_factory=lambda: [[]])
    signs: list[str] = field(default_factory=list)

    def text(self) -> Nodes:
        """All of it as text, but for what is in brackets within it."""
        nodes: Nodes = [self.bracket, self.parts[0]]
        for sign, part in zip(self.signs, self.parts[1:], strict=True):
            nodes += [sign, part]
        return nodes

    def closed(self, bracket: str) -> Node:
        """What it is with its closing bracket."""
        *parts, last = self.parts
        if bracket == "]" and set(self.signs) == {"|"}:
            return Alternating(self.parts)
        words = [node for node in last if isinstance(node, str)]
        when = _WHEN.fullmatch("".join(words)) if len(words) == len(last) else None
        if bracket == "]" and self.signs in ([":"], [":", ":"]) and when is not None:
            before: Nodes = parts[0] if len(parts) == 2 else []
            return Scheduled(before, parts[-1], when[1])
        return [*self.text(), bracket]


def schedule(text: str) -> Words:
    """A text whose square brackets change it from step to step.

    Brackets that do not match, and those that say nothing of steps, stay in the text.
    """
    frames = [_Open("")]
    changes = False

    def give_up() -> None:
        for frame in frames[1:]:
            frames[0].parts[-1].append(frame.text())
        del frames[1:]

    for token in _TOKEN.findall(text):
        here = frames[-1]
        if token in ("[", "("):
            frames.append(_Open(token))
        elif token in ("]", ")"):
            if here.bracket == {"]": "[", ")": "("}[token]:
                frames.pop()
                node = here.closed(token)
                changes |= isinstance(node, Scheduled | Alternating)
                frames[-1].parts[-1].append(node)
            else:
                give_up()
                frames[0].parts[-1].append(token)
        elif token in (":", "|") and here.bracket == "[":
            here.signs.append(token)
            here.parts.append([])
        else:
            here.parts[-1].append(token[1:] if token in ("\\:", "\\|") else token)
    give_up()
    words = Words(frames[0].parts[0])
    return words if changes else plain(words.at(1, 1))

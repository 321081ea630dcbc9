"""The condition of a network: all that it is told besides x_t and t."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from latentdiff.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class Residuals:
    """Maps [B, C, h, w] to add to those of a U-Net; each list may be empty.

    Attributes:
        skips: for each of its skips, in their order, and for what its middle gives: of ControlNets.
        levels: for the end of each level on the way down, and of the middle where there is one
            more: of T2I-Adapters.
    """

    skips: Sequence[Tensor] = ()
    levels: Sequence[Tensor] = ()

    def __add__(self, other: "Residuals") -> "Residuals":
        return Residuals(_sums(self.skips, other.skips), _sums(self.levels, other.levels))


def _sums(one: Sequence[Tensor], other: Sequence[Tensor]) -> Sequence[Tensor]:
    if not one or not other:
        return one or other
    return [a + b for a, b in zip(one, other, strict=True)]


class ControlsNetwork(Protocol):
    """A network beside another, whose skips it adds to: see `latentdiff.models.control`."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        states: Tensor,
        mask: Tensor | None,
        added: Mapping[str, Tensor] | None,
        hint: "Hint",
    ) -> Residuals: ...


@dataclass(frozen=True, slots=True, eq=False)
class Hint:
    """A control of B pictures, as the network is told it.

    Attributes:
        network: reads it.
        embedded: maps [B, W, h, w] of the control pictures, as that network has embedded them.
        scale: strength for each picture [B]; 0 is off.
        window: it is told at times low < t <= high.
        guess: it is told in guess mode: see `latentdiff.models.control.ControlNetwork`.
    """

    network: ControlsNetwork
    embedded: tuple[Tensor, ...]
    scale: Tensor
    window: tuple[float, float] = (-math.inf, math.inf)
    guess: bool = False

    def take(self, rows: Sequence[int] | Tensor) -> Self:
        """The hint of these pictures, in this order."""
        rows = _places(rows)
        embedded = tuple(one[rows] for one in self.embedded)
        return replace(self, embedded=embedded, scale=self.scale[rows])


class ReadsTokens(Protocol):
    """An image adapter: see `latentdiff.models.image_prompts`."""

    def keys_and_values(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, W] of tokens [B, S, D], for a cross-attention layer."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ImageTokens:
    """Pictures that B pictures are drawn after, as the network attends to them beside the text.

    Attributes:
        adapter: gives each cross-attention layer keys and values of them.
        tokens: the pictures as an image encoder, and the adapter, see them [B, S, D].
        scale: strength of what is attended to; 0 is off.
    """

    adapter: ReadsTokens
    tokens: Tensor
    scale: float = 1.0

    def take(self, rows: Sequence[int] | Tensor) -> Self:
        """The tokens of these pictures, in this order."""
        return replace(self, tokens=self.tokens[_places(rows)])


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """Tensors with the batch first, each None where a network has no use for it.

    Attributes:
        states: text states for cross-attention [B, L, D].
        mask: bool [B, L], True where the network may look; None: it looks everywhere.
        pooled: one vector of a prompt [B, P].
        sizes: numbers about the picture [B, n], such as its size, its crop and its target in
            pixels: what they are is the conditioner's.
        guidance_embedding: the guidance scale [B, G], of networks with their guidance in them.
        noise: standard normal numbers [B, Z], anew at each call, of generators.
        beside: further channels behind those of x [B, extra, h, w].
        noise_level: level of the noise in a small picture that stands beside x, int64 [B].
        control: controls of other networks, as ControlNets, which add up.
        images: pictures to attend to beside the states, as IP-Adapters show them, which add up.
    """

    states: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    guidance_embedding: Tensor | None = None
    noise: Tensor | None = None
    beside: Tensor | None = None
    noise_level: Tensor | None = None
    control: tuple[Hint, ...] = ()
    images: tuple[ImageTokens, ...] = ()

    def given(self) -> dict[str, Tensor]:
        """The tensors that are not None, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def take(self, rows: Sequence[int]) -> Self:
        """The condition of these rows, in this order; a row may be named twice."""
        taken = {name: value[list(rows)] for name, value in self.given().items()}
        control = tuple(hint.take(rows) for hint in self.control)
        images = tuple(tokens.take(rows) for tokens in self.images)
        return replace(self, **taken, control=control, images=images)


def joined(conditions: Sequence[Condition]) -> Condition:
    """Several conditions as one batch, in their order.

    States of different lengths are padded to the longest, and the padding is masked. Where only
    some have a mask, the others get one that lets the network look everywhere.

    Raises:
        UserError: the conditions do not have the same fields, or differ in more than the length
            of the states.
    """
    if len(conditions) == 1:
        return conditions[0]
    parts = [condition.given() for condition in _of_one_length(conditions)]
    shapes = [{name: value.shape for name, value in each.items()} for each in parts]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError(
            f"conditions of one call must have the same fields and shapes, not {shapes}."
        )
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Condition(
        **values,
        control=_joined_hints([each.control for each in conditions]),
        images=_joined_images([each.images for each in conditions]),
    )


def _places(rows: Sequence[int] | Tensor) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.tensor(list(rows))


def _joined_hints(told: Sequence[tuple[Hint, ...]]) -> tuple[Hint, ...]:
    kinds = [[(hint.network, hint.window, hint.guess) for hint in hints] for hints in told]
    if any(kind != kinds[0] for kind in kinds):
        raise UserError("conditions of one call must have the same controls.")
    return tuple(
        replace(
            same[0],
            embedded=tuple(map(torch.cat, zip(*(hint.embedded for hint in same), strict=True))),
            scale=torch.cat([hint.scale for hint in same]),
        )
        for same in zip(*told, strict=True)
    )


def _joined_images(told: Sequence[tuple[ImageTokens, ...]]) -> tuple[ImageTokens, ...]:
    kinds = [[(one.adapter, one.scale, one.tokens.shape[1]) for one in images] for images in told]
    if any(kind != kinds[0] for kind in kinds):
        raise UserError("conditions of one call must have the same image prompts.")
    return tuple(
        replace(same[0], tokens=torch.cat([one.tokens for one in same]))
        for same in zip(*told, strict=True)
    )


def _of_one_length(conditions: Sequence[Condition]) -> Sequence[Condition]:
    """The conditions with states [B, L, D] of the longest L and a mask, where either differs."""
    lengths = {c.states.shape[1] for c in conditions if c.states is not None}
    masked = {c.mask is not None for c in conditions if c.states is not None}
    if len(lengths) < 2 and len(masked) < 2:
        return conditions
    longest = max(lengths)
    padded: list[Condition] = []
    for condition in conditions:
        given, states = condition.given(), condition.states
        if states is not None:
            seen = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            missing = longest - states.shape[1]
            given["states"] = torch.nn.functional.pad(states, (0, 0, 0, missing))
            given["mask"] = torch.nn.functional.pad(given.get("mask", seen), (0, missing))
        padded.append(replace(condition, **given))
    return padded

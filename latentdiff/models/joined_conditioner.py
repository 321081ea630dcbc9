"""The conditioner of Stable Diffusion XL: states of two CLIP encoders, pooled text and sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from latentdiff.diffusion.condition import Condition
from latentdiff.errors import UserError
from latentdiff.models.conditioner import Encoded, SizeConditions
from latentdiff.models.long_prompts import long_states
from latentdiff.models.prompt_weights import window_states
from latentdiff.models.text_encoders import (
    PLAIN,
    PenultimateTower,
    Reading,
    TextStates,
    Tokens,
)

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


@dataclass(frozen=True, eq=False)
class JoinedConditioner:
    """Text encoders whose states stand side by side; the last one also gives the pooled vector.

    Tokens are [B, encoders, L]: tokenizers that share their words differ in their padding.

    Attributes:
        towers: the encoders with their tokenizers, by the names of their folders.
        zero_empty: whether the states and the pooled vector of a prompt without words are zero, as
            the network was trained ("force_zeros_for_empty_prompt" in diffusers).
        aesthetic: whether an aesthetic score stands in place of the target size, as in the refiner.

    Raises:
        UserError: the last encoder has no projection, or their windows differ.
    """

    towers: Mapping[str, PenultimateTower]  # pyright: ignore[reportIncompatibleMethodOverride]
    zero_empty: bool
    aesthetic: bool

    def __post_init__(self) -> None:
        windows = {tower.window for tower in self.towers.values()}
        if len(windows) > 1:
            raise UserError(f"tokenizers: their windows differ, {sorted(windows)} tokens.")
        if self._last.pooled_width is None:
            raise UserError(f"{list(self.towers)[-1]}: it has no projection to pool texts with.")

    @property
    def _last(self) -> PenultimateTower:
        return list(self.towers.values())[-1]

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {name: tower.model for name, tower in self.towers.items()}

    @property
    def width(self) -> int:
        return sum(tower.width for tower in self.towers.values())

    @property
    def pooled_width(self) -> int | None:
        return self._last.pooled_width

    @property
    def window(self) -> int:
        return self._last.window

    @property
    def padding(self) -> str:
        pads = [tower.tokenizer.pad_token_id for tower in self.towers.values()]
        zero = "zero" if self.zero_empty else "encoded"
        return f"tokens {pads}, window {self.window}, empty prompts {zero}"

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        each = [tower.tokenize(prompts) for tower in self.towers.values()]
        ids, mask = (torch.stack([getattr(t, name) for t in each], 1) for name in ("ids", "mask"))
        cut = zip(*(tokens.cut for tokens in each), strict=True)
        return Tokens(ids, mask, [max(ends, key=len) for ends in cut])

    def states(self, tokens: Tokens) -> TextStates:
        each = [
            tower.states(Tokens(tokens.ids[:, number], tokens.mask[:, number], tokens.cut))
            for number, tower in enumerate(self.towers.values())
        ]
        return self._joined(each, tokens)

    def _joined(self, each: Sequence[TextStates], tokens: Tokens) -> TextStates:
        """One answer out of that of each encoder."""
        states, pooled = torch.cat([text.states for text in each], -1), each[-1].pooled
        assert pooled is not None
        if self.zero_empty:
            # A prompt without words is its two marks.
            words = (tokens.mask.sum(-1) > 2).any(1).to(states.device)
            states, pooled = states * words[:, None, None], pooled * words[:, None]
        return TextStates(states, None, tokens.cut, pooled)

    def condition(self, text: TextStates, size: tuple[int, int]) -> Condition:
        condition = Condition(states=text.states, mask=text.mask, pooled=text.pooled)
        return self.sized(condition, size, SizeConditions())

    def sized(
        self,
        condition: Condition,
        size: tuple[int, int],
        told: SizeConditions,
        *,
        negative: bool = False,
    ) -> Condition:
        """See `Conditioner.sized`. The numbers of a row are original size, crop, and target size or
        aesthetic score."""
        refused = ["target_size"] if self.aesthetic else _SCORES
        for name in told.given():
            if name in refused:
                kind = "a refiner" if self.aesthetic else "no refiner"
                raise UserError(f"{name}: this model is {kind} and is not told it; leave it out.")
        row: list[float] = [*(told.original_size or size), *(told.crop or (0, 0))]
        if not self.aesthetic:
            row += told.target_size or size
        elif negative:
            score = told.negative_aesthetic_score
            row.append(NEGATIVE_AESTHETIC_SCORE if score is None else score)
        else:
            row.append(AESTHETIC_SCORE if told.aesthetic_score is None else told.aesthetic_score)
        assert condition.states is not None
        sizes = torch.tensor([row] * len(condition.states), dtype=torch.float32)
        return replace(condition, sizes=sizes.to(condition.states.device))

    def encode(
        self, prompts: Sequence[str], size: tuple[int, int], reading: Reading = PLAIN
    ) -> Encoded:
        states = long_states if reading.long else window_states
        each = [states(tower, prompts, reading) for tower in self.towers.values()]
        each = _of_one_length(each)
        text = self._joined(each, replace(self.tokenize(prompts), cut=each[-1].cut))
        return Encoded(self.condition(text, size), text.cut)

    def with_modules(self, modules: Mapping[str, nn.Module]) -> Self:
        towers: Any = {n: tower.with_model(modules[n]) for n, tower in self.towers.items()}
        return replace(self, towers=towers)

    def with_towers(self, towers: Mapping[str, Any]) -> Self:
        return replace(self, towers=dict(towers))


_SCORES = ["aesthetic_score", "negative_aesthetic_score"]


def _of_one_length(each: Sequence[TextStates]) -> list[TextStates]:
    """Long prompts may be read in more chunks by one encoder, which knows other words, than by
    another: then states of nothing follow."""
    longest = max(text.states.shape[1] for text in each)
    return [replace(text, states=_padded(text.states, longest)) for text in each]


def _padded(states: Tensor, length: int) -> Tensor:
    return nn.functional.pad(states, (0, 0, 0, length - states.shape[1]))

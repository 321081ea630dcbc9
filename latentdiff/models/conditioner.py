"""The conditioner of a model: prompts to the condition of its network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import nn

from latentdiff.diffusion.condition import Condition
from latentdiff.models.long_prompts import long_states
from latentdiff.models.prompt_weights import weighted_states
from latentdiff.models.text_encoders import TextStates, TextTower, Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Prompts, encoded.

    Attributes:
        condition: the condition of the B prompts.
        cut: for each prompt, the part beyond the token window; "" if all of it fits.
    """

    condition: Condition
    cut: list[str]


class Conditioner(Protocol):
    """Prompts in, the condition of a network out; one or several text encoders.

    `tokenize` and `states` are the two halves of a text encoder's work, for training: tokens of all
    captions are made once, and states too, where the encoders are not trained along.
    """

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The text encoders by the names of their folders, for weights, device and training."""
        ...

    @property
    def width(self) -> int:
        """D of the states."""
        ...

    @property
    def window(self) -> int:
        """The most tokens of one prompt, start and end included."""
        ...

    @property
    def padding(self) -> str:
        """A text that names what prompts are padded with: of other padding, states differ."""
        ...

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Prompts as numbers, each shortened to the window."""
        ...

    def states(self, tokens: Tokens) -> TextStates:
        """The text encoders' answer; gradients flow unless the caller forbids it."""
        ...

    def condition(self, text: TextStates, size: tuple[int, int]) -> Condition:
        """The condition of B prompts for pictures of this height and width."""
        ...

    def encode(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        *,
        weights: bool = False,
        long: bool = False,
    ) -> Encoded:
        """Prompts to their condition.

        Args:
            prompts: B texts.
            size: height and width of the pictures.
            weights: read weights in the texts: see `latentdiff.models.prompt_weights`.
            long: read texts beyond the window, too: see `latentdiff.models.long_prompts`.

        Raises:
            UserError: a weight is out of range, or these encoders read no long texts.
        """
        ...

    def with_modules(self, modules: Mapping[str, nn.Module]) -> Self:
        """The same conditioner with other text encoders of the same kinds."""
        ...


@dataclass(frozen=True, eq=False)
class TextConditioner:
    """One text encoder, whose states are all that the network is told.

    Attributes:
        tower: the encoder with its tokenizer.
    """

    tower: TextTower

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"text_encoder": self.tower.model}

    @property
    def width(self) -> int:
        return self.tower.width

    @property
    def window(self) -> int:
        return self.tower.window

    @property
    def padding(self) -> str:
        return f"token {self.tower.tokenizer.pad_token_id}, window {self.tower.window}"

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        return self.tower.tokenize(prompts)

    def states(self, tokens: Tokens) -> TextStates:
        return self.tower.states(tokens)

    def condition(self, text: TextStates, size: tuple[int, int]) -> Condition:
        return Condition(states=text.states, mask=text.mask)

    def encode(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        *,
        weights: bool = False,
        long: bool = False,
    ) -> Encoded:
        if long:
            text = long_states(self.tower, prompts, weights=weights)
        else:
            text = weighted_states(self.tower, prompts) if weights else self.tower.encode(prompts)
        return Encoded(self.condition(text, size), text.cut)

    def with_modules(self, modules: Mapping[str, nn.Module]) -> Self:
        kind: Any = type(self.tower)
        return type(self)(kind(modules["text_encoder"], self.tower.tokenizer))

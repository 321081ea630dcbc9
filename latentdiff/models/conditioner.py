"""The conditioner of a model: prompts to the condition of its network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

from torch import nn

from latentdiff.diffusion.condition import Condition
from latentdiff.errors import UserError
from latentdiff.models.long_prompts import long_states
from latentdiff.models.prompt_weights import window_states
from latentdiff.models.text_encoders import PLAIN, Reading, TextStates, TextTower, Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Prompts, encoded.

    Attributes:
        condition: the condition of the B prompts.
        cut: for each prompt, the part beyond the token window; "" if all of it fits.
    """

    condition: Condition
    cut: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeConditions:
    """What a network of the Stable Diffusion XL family is told of a picture beside its prompt:
    Podell et al. 2023, sec. 2.2. None takes the usual value.

    Attributes:
        original_size: height and width in pixels that a picture of the training data had before it
            was resized; by default those of the picture drawn. Small ones draw blurred pictures.
        crop: top and left, in pixels, of what was cut out of it; by default (0, 0).
        target_size: height and width in pixels of the picture; by default those of the one drawn.
        aesthetic_score: of a refiner alone, about 1 .. 10; by default 6.
        negative_aesthetic_score: the same of what guidance leads away from; by default 2.5.
    """

    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None

    def given(self) -> list[str]:
        """The names of those that are not None."""
        return [each.name for each in fields(self) if getattr(self, each.name) is not None]


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
    def towers(self) -> Mapping[str, TextTower]:
        """The text encoders with their tokenizers, by the same names."""
        ...

    @property
    def width(self) -> int:
        """D of the states."""
        ...

    @property
    def pooled_width(self) -> int | None:
        """P of the pooled vector; None where the network is told none."""
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

    def sized(
        self,
        condition: Condition,
        size: tuple[int, int],
        told: SizeConditions,
        *,
        negative: bool = False,
    ) -> Condition:
        """The condition with other numbers about the picture, where the network is told any.

        Args:
            condition: the condition of B pictures.
            size: height and width of the pictures.
            told: the numbers.
            negative: whether the condition is one that guidance leads away from.

        Raises:
            UserError: the network is not told one of them.
        """
        ...

    def encode(
        self, prompts: Sequence[str], size: tuple[int, int], reading: Reading = PLAIN
    ) -> Encoded:
        """Prompts to their condition.

        Args:
            prompts: B texts.
            size: height and width of the pictures.
            reading: how they are read: weights, long texts, layers left out.

        Raises:
            UserError: a weight is out of range, or these encoders cannot read them so.
        """
        ...

    def with_modules(self, modules: Mapping[str, nn.Module]) -> Self:
        """The same conditioner with other text encoders of the same kinds."""
        ...

    def with_towers(self, towers: Mapping[str, TextTower]) -> Self:
        """The same conditioner with other text encoders and tokenizers of the same kinds."""
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
    def towers(self) -> Mapping[str, TextTower]:
        return {"text_encoder": self.tower}

    @property
    def width(self) -> int:
        return self.tower.width

    @property
    def pooled_width(self) -> int | None:
        return None

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

    def sized(
        self,
        condition: Condition,
        size: tuple[int, int],
        told: SizeConditions,
        *,
        negative: bool = False,
    ) -> Condition:
        for name in told.given():
            raise UserError(f"{name}: this model is told its prompt alone; leave it out.")
        return condition

    def encode(
        self, prompts: Sequence[str], size: tuple[int, int], reading: Reading = PLAIN
    ) -> Encoded:
        states = long_states if reading.long else window_states
        text = states(self.tower, prompts, reading)
        return Encoded(self.condition(text, size), text.cut)

    def with_modules(self, modules: Mapping[str, nn.Module]) -> Self:
        return replace(self, tower=self.tower.with_model(modules["text_encoder"]))

    def with_towers(self, towers: Mapping[str, TextTower]) -> Self:
        return replace(self, tower=towers["text_encoder"])

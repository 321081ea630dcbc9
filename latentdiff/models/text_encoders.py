"""Text towers: prompts in, states for cross-attention out.

A tower joins a text encoder, ours or out of transformers, with its tokenizer. Nothing in it changes
after it is built, so threads may share one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, Union

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPTextModel
    from transformers.models.t5.modeling_t5 import T5EncoderModel
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    from latentdiff.models.clip_text import ClipTextEncoder
    from latentdiff.models.clip_tokenizer import ClipTokenizer
    from latentdiff.models.t5_text import T5TextEncoder
    from latentdiff.models.t5_tokenizer import T5Tokenizer

Tokenizer = Union["ClipTokenizer", "T5Tokenizer", "TokenizersBackend"]

_PROBE = "a photo of 2 cats, \u00fcber \u732b's!\n"
# T5 has no longest text; this is what it was trained on, when its tokenizer does not say.
_T5_WINDOW = 512


WeightRule = Literal["comfyui", "a1111"]
"""What a weight does to the states of a word: see `latentdiff.models.prompt_weights`."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How prompts are read; by default as plain words, up to the window.

    Attributes:
        weights: the rule by which weights in them act; None: brackets are words.
        long: read them beyond the window, too: see `latentdiff.models.long_prompts`.
        clip_skip: how many of CLIP's last layers are left out, counted as diffusers does.
    """

    weights: WeightRule | None = None
    long: bool = False
    clip_skip: int = 0


PLAIN = Reading()


@dataclass(frozen=True, slots=True)
class Tokens:
    """A batch of prompts as numbers.

    Attributes:
        ids: [B, L] int64 on the CPU, padded.
        mask: [B, L] bool, True where a token is not padding.
        cut: for each prompt, the part beyond the token window; "" if all of it fits.
    """

    ids: Tensor
    mask: Tensor
    cut: list[str]

    def take(self, rows: Sequence[int]) -> Self:
        """These prompts, in this order."""
        places = list(rows)
        cut = [self.cut[place] for place in places]
        return type(self)(self.ids[places], self.mask[places], cut)


@dataclass(frozen=True, slots=True)
class TextStates:
    """Text embeddings that condition a denoiser (`prompt_embeds` in diffusers).

    Attributes:
        states: [B, L, D] on the tower's device.
        mask: [B, L] bool, True where the denoiser may attend; None for everywhere.
        cut: for each prompt, the part beyond the token window; "" if all of it fits.
        pooled: one vector of each prompt [B, P], where the denoiser is told any.
    """

    states: Tensor
    mask: Tensor | None
    cut: list[str]
    pooled: Tensor | None = None


class TextTower(Protocol):
    """Prompts in, `TextStates` out."""

    @property
    def model(self) -> "ClipTextEncoder | CLIPTextModel | T5TextEncoder | T5EncoderModel":
        """The network, for its weights, its device and training it along."""
        ...

    @property
    def tokenizer(self) -> "Tokenizer": ...

    @property
    def width(self) -> int:
        """D of the states."""
        ...

    @property
    def window(self) -> int:
        """The most tokens of one prompt, start and end included."""
        ...

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Prompts as ids, each shortened to the window; `Tokens.cut` says what that lost."""
        ...

    def states(self, tokens: Tokens, clip_skip: int = 0) -> TextStates:
        """The network's answer; gradients flow unless the caller forbids it.

        Args:
            tokens: of `tokenize`.
            clip_skip: how many of CLIP's last layers are left out.

        Raises:
            UserError: the network has no more layers than that, or is no CLIP.
        """
        ...

    def encode(self, prompts: Sequence[str], clip_skip: int = 0) -> TextStates:
        """`tokenize`, then `states`."""
        ...

    def with_model(self, model: nn.Module) -> Self:
        """The same text encoder with other weights."""
        ...


class ClipTower:
    """Any CLIP text model, used as Stable Diffusion 1 and 2 do.

    The states are the last hidden states after the final layer norm; prompts are padded to the
    whole window and the denoiser sees the padding too. The encoder sees it unless its config says
    `use_attention_mask`, a key that diffusers' pipelines read.
    """

    def __init__(self, model: "ClipTextEncoder | CLIPTextModel", tokenizer: "Tokenizer") -> None:
        positions = model.config.max_position_embeddings
        self.model = model
        self.tokenizer = tokenizer
        self.width: int = model.config.hidden_size
        self.window: int = min(positions, _declared_window(tokenizer, positions))
        _check_tokenizer(tokenizer, model.config.vocab_size)

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        return _tokenize(self.tokenizer, prompts, self.window, self.window)

    def states(self, tokens: Tokens, clip_skip: int = 0) -> TextStates:
        _check_skip(clip_skip, self.model.config.num_hidden_layers)
        further: dict[str, Any] = {}
        if getattr(self.model.config, "use_attention_mask", False):
            further["attention_mask"] = tokens.mask.to(self.model.device)
        ids = tokens.ids.to(self.model.device)
        if clip_skip:
            hidden = self.model(input_ids=ids, output_hidden_states=True, **further).hidden_states
            states = self.model.final_layer_norm(hidden[-1 - clip_skip])
        else:
            states = self.model(input_ids=ids, **further).last_hidden_state
        return TextStates(states, None, tokens.cut)

    def encode(self, prompts: Sequence[str], clip_skip: int = 0) -> TextStates:
        return self.states(self.tokenize(prompts), clip_skip)

    def with_model(self, model: Any) -> Self:
        return type(self)(model, self.tokenizer)


class PenultimateTower(ClipTower):
    """A CLIP text model as Stable Diffusion XL uses it: Podell et al. 2023, sec. 2.1.

    The states are those in front of the last layer, without a norm; layers that are left out are
    counted from there. A model with a projection also
    gives a pooled vector: the projection of the last layer's state, behind its norm, at the end of
    the text.
    """

    @property
    def pooled_width(self) -> int | None:
        """P of the pooled vector; None of a model without a projection."""
        projection: Any = getattr(self.model, "text_projection", None)
        return None if projection is None else projection.out_features

    def states(self, tokens: Tokens, clip_skip: int = 0) -> TextStates:
        _check_skip(clip_skip, self.model.config.num_hidden_layers - 1)
        ids = tokens.ids.to(self.model.device)
        said = self.model(input_ids=ids, output_hidden_states=True)
        assert said.hidden_states is not None
        states, pooled = said.hidden_states[-2 - clip_skip], None
        if self.pooled_width is not None:
            # The place of the end mark. transformers looks for the largest id, which is that of a
            # learned word where there is one.
            ends = tokens.mask.sum(1).to(ids.device) - 1
            last = said.last_hidden_state[torch.arange(len(ids), device=ids.device), ends]
            model: Any = self.model
            pooled = model.text_projection(last)
        return TextStates(states, None, tokens.cut, pooled)


def _check_skip(clip_skip: int, layers: int) -> None:
    """Pass if an encoder has more layers than are to be left out.

    Raises:
        UserError: it has not.
    """
    if not 0 <= clip_skip < layers:
        raise UserError(f"clip_skip: must be from 0 to {layers - 1} here, not {clip_skip}.")


class T5Tower:
    """Any T5 encoder (T5, T5 1.1, mT5, UMT5).

    Prompts are padded to the longest of the batch; neither the encoder nor the denoiser sees the
    padding.

    Args:
        model: the encoder.
        tokenizer: of its words.
        window: the most tokens of one prompt; None for what the tokenizer's files say, else 512.
    """

    def __init__(
        self,
        model: "T5TextEncoder | T5EncoderModel",
        tokenizer: "Tokenizer",
        window: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.width: int = model.config.d_model
        self.window: int = window or _declared_window(tokenizer, _T5_WINDOW)
        _check_tokenizer(tokenizer, model.config.vocab_size)

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        return _tokenize(self.tokenizer, prompts, self.window, 1)

    def states(self, tokens: Tokens, clip_skip: int = 0) -> TextStates:
        if clip_skip:
            raise UserError("clip_skip: only a CLIP text encoder has layers to skip, not a T5.")
        mask = tokens.mask.to(self.model.device)
        output = self.model(input_ids=tokens.ids.to(self.model.device), attention_mask=mask)
        return TextStates(output.last_hidden_state, mask, tokens.cut)

    def encode(self, prompts: Sequence[str], clip_skip: int = 0) -> TextStates:
        return self.states(self.tokenize(prompts), clip_skip)

    def with_model(self, model: Any) -> Self:
        return type(self)(model, self.tokenizer, self.window)


def token_spans(tower: TextTower, prompt: str) -> list[tuple[int, int]]:
    """Map each token of `tower.tokenize([prompt])` to its characters [start, end) of the prompt.

    Start and end tokens map to (0, 0). Two tokens may share a character.
    """
    spans = [span for _, span in encode_tokens(tower.tokenizer, prompt)]
    return spans if len(spans) <= tower.window else spans[: tower.window - 1] + spans[-1:]


def _declared_window(tokenizer: "Tokenizer", default: int) -> int:
    """Read the tokenizer's maximum length; transformers stores 1e30 where it is unknown."""
    declared = tokenizer.model_max_length
    return declared if isinstance(declared, int) and 2 <= declared <= 100_000 else default


def _check_tokenizer(tokenizer: "Tokenizer", vocab_size: int) -> None:
    """Prepare the tokenizer for calls that leave it unchanged, and see that its ids have rows."""
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token; set pad_token in its config.")
    highest = max(tokenizer.backend_tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer gives token ids up to {highest}, but the text encoder knows only "
            f"{vocab_size} tokens."
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for text in ("", _PROBE):
        highest = max((token for token, _ in encode_tokens(tokenizer, text)), default=0)
        if highest >= vocab_size:
            raise UserError(f"the tokenizer gives a token id {highest} that it has no word for.")


def encode_tokens(tokenizer: "Tokenizer", prompt: str) -> list[tuple[int, tuple[int, int]]]:
    """The tokens of a prompt, each with its characters [start, end); (0, 0) of start and end marks.

    A learned word of several vectors is one token in the text, `<cat>`, and those that follow it,
    `<cat>_1`, `<cat>_2`: so diffusers names them, and reads the first as all of them.
    """
    try:
        encoded = tokenizer.backend_tokenizer.encode(prompt)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # bare ones of the library, and Rust's panics, no `Exception`s
        told = " ".join(str(error).split())
        raise UserError(f"the tokenizer cannot read {prompt!r:.60} ({told:.200}).") from error
    added = tokenizer.added_tokens_encoder
    words = {number: word for word, number in added.items() if f"{word}_1" in added}
    tokens: list[tuple[int, tuple[int, int]]] = []
    for token, mark, span in zip(
        encoded.ids, encoded.special_tokens_mask, encoded.offsets, strict=True
    ):
        tokens.append((token, (0, 0) if mark else span))
        if token in words:
            further = takewhile(added.__contains__, (f"{words[token]}_{k}" for k in count(1)))
            tokens += [(added[word], span) for word in further]
    return tokens


def _tokenize(tokenizer: "Tokenizer", prompts: Sequence[str], window: int, length: int) -> Tokens:
    """Ids padded to `length` or the longest prompt, whichever is more.

    transformers' own call sets truncation and padding on the shared tokenizer each time, which is
    not safe between threads; what it computes is done here on the ids.
    """
    rows: list[list[int]] = []
    cut: list[str] = []
    for prompt in prompts:
        encoded = encode_tokens(tokenizer, prompt)
        ids = [token for token, _ in encoded]
        if len(ids) > window:  # the last token, the end mark, stays
            cut.append(prompt[encoded[window - 1][1][0] :])
            ids = ids[: window - 1] + ids[-1:]
        else:
            cut.append("")
        rows.append(ids)
    return Tokens(*pad_tokens(rows, length, tokenizer), cut)


def pad_tokens(
    rows: Sequence[list[int]], length: int, tokenizer: "Tokenizer"
) -> tuple[Tensor, Tensor]:
    """Ids padded to `length` or the longest row, int64 [B, L]; and where they are not, bool."""
    length = max(length, *map(len, rows))
    pad = tokenizer.pad_token_id
    padded = [row + [pad] * (length - len(row)) for row in rows]
    kept = [[True] * len(row) + [False] * (length - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor(kept)

"""The caption that a sample is trained with, and what the text encoders make of it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from latentdiff.data.cache import TextCache
from latentdiff.errors import UserError
from latentdiff.learning.finetune_config import CaptionsConfig
from latentdiff.learning.order import Stream, generator
from latentdiff.learning.tags import apart
from latentdiff.models.conditioner import Conditioner
from latentdiff.models.identity import weights_hash
from latentdiff.models.text_encoders import TextStates, Tokens
from latentdiff.reading import half_character


class Captions:
    """Tokens of every caption, made once, and the choice among them: f(seed, step, place).

    Args:
        captions: the captions of each sample.
        dropout: probability of the empty caption instead, for classifier-free guidance (Ho &
            Salimans 2022, algorithm 1); one for all, or of each sample.
        config: the words of a style, and how often they or the rest of a caption are left out.

    Raises:
        UserError: a caption has half a character, which no tokenizer takes.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        captions: Sequence[Sequence[str]],
        dropout: float | Sequence[float],
        seed: int,
        config: CaptionsConfig | None = None,
    ) -> None:
        self.config = config or CaptionsConfig()
        unique = {"": 0}
        for caption in (caption for own in captions for caption in own):
            unique.setdefault(caption, len(unique))
        parts = {text: apart(text, self.config.style) for text in unique}
        for caption in (part for both in parts.values() for part in both or ()):
            unique.setdefault(caption, len(unique))
        # of a caption that ends in the style's words: the rows of what comes before, and of these
        self.apart = {
            unique[text]: (unique[both[0]], unique[both[1]]) for text, both in parts.items() if both
        }
        for caption in unique:
            if half := half_character(caption):
                raise UserError(f"a caption has half a character ({half}): {caption:.60}")
        self.rows = [[unique[caption] for caption in own] or [0] for own in captions]
        self.all = conditioner.tokenize(list(unique))
        self.cut = [both for both in zip(unique, self.all.cut, strict=True) if both[1]]
        self.window = conditioner.window
        self.dropout = dropout if isinstance(dropout, Sequence) else [dropout] * len(captions)
        self.seed = seed

    def warnings(self) -> list[str]:
        """A line if captions are longer than the window: nothing is learned of their ends."""
        if not self.cut:
            return []
        text, lost = self.cut[0]
        return [
            f"{len(self.cut)} captions are longer than the text encoder's window of {self.window} "
            f"tokens; the first: {text[:40]!r}..., not used: {lost[:40]!r}"
        ]

    def choose(self, step: int, places: list[int], samples: list[int]) -> list[int]:
        """A row of `all` per sample; row 0, the empty caption, with its probability."""
        rows: list[int] = []
        for place, sample in zip(places, samples, strict=True):
            random = generator(self.seed, Stream.CAPTION, step, place)
            dropped = random.random() < self.dropout[sample]
            row = self.rows[sample][random.integers(len(self.rows[sample]))]
            if row in self.apart:
                content, style = self.apart[row]
                drawn = random.random() - self.config.style_dropout
                row = content if drawn < 0 else row
                row = style if 0 <= drawn < self.config.content_dropout else row
            rows.append(0 if dropped else row)
        return rows

    def tokens(self, step: int, places: list[int], samples: list[int]) -> Tokens:
        """The tokens of the chosen captions, for a tower that is trained along."""
        rows = self.choose(step, places, samples)
        return self.all.take(rows)


class CaptionStates:
    """The states of every caption, made once by a tower that stays as it is, kept in a cache.

    Raises:
        UserError: the cache cannot be written.
    """

    def __init__(self, captions: Captions, conditioner: Conditioner, folder: Path) -> None:
        weights = " ".join(weights_hash(m.state_dict()) for m in conditioner.modules.values())
        cache = TextCache(folder, weights, conditioner.padding)
        self.captions = captions
        self.width, self.pooled = conditioner.width, conditioner.pooled_width
        self.states = cache.states(captions.all, conditioner.states)
        with torch.no_grad():
            self.masked = conditioner.states(captions.all.take([0])).mask is not None

    def of(self, step: int, places: list[int], samples: list[int]) -> TextStates:
        """The states of the chosen captions [B, L, D], on the CPU."""
        chosen = [self.states[row] for row in self.captions.choose(step, places, samples)]
        cut, pooled = [""] * len(chosen), None
        if self.pooled is not None:
            pooled = torch.stack([one[-self.pooled :] for one in chosen])
            chosen = [one[: -self.pooled].unflatten(0, (-1, self.width)) for one in chosen]
        states = pad_sequence(chosen, batch_first=True)
        if not self.masked:
            return TextStates(states, None, cut, pooled)
        lengths = torch.tensor([len(one) for one in chosen])
        mask: Tensor = torch.arange(states.shape[1]) < lengths[:, None]
        return TextStates(states, mask, cut, pooled)

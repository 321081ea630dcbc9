"""Lessons of a text tower from a sentence encoder: texts, words and the teacher's vectors."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from latentdiff.files import write_text
from latentdiff.formats.weights import save_tensors
from latentdiff.models.fresh_text import WORD_END


@dataclass(frozen=True)
class Lesson:
    """A text as the tower reads it.

    Attributes:
        ids: tokens, start and end included, at most the window.
        ends: places of the tokens that end a word.
        words: rows of the table of single words, one for each of `ends`.
    """

    ids: list[int]
    ends: list[int]
    words: list[int]


def lessons(
    texts: Sequence[str], tokenizer: CLIPTokenizer, known: Sequence[str] | None = None
) -> tuple[list[Lesson], list[str]]:
    """Every text in tokens, and the table of single words: `known`, or all that there are."""
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    coded = tokenizer(list(texts), truncation=True, max_length=tokenizer.model_max_length)
    table: dict[str, int] = {word: row for row, word in enumerate(known or ())}
    found: list[Lesson] = []
    for ids in coded["input_ids"]:  # pyright: ignore
        ends, rows, word = [], [], ""
        for place, number in enumerate(ids):  # pyright: ignore
            token = tokens[number]
            word += token.removesuffix(WORD_END)
            if token.endswith(WORD_END):
                if word.isascii() and word.isalnum() and (known is None or word in table):
                    ends.append(place)
                    rows.append(table.setdefault(word, len(table)))
                word = ""
            elif token.startswith("<|"):
                word = ""
        found.append(Lesson(list(ids), ends, rows))  # pyright: ignore
    return found, list(table)


class Taught(nn.Module):
    """The tower and the matrices that its states are compared with the teacher's through."""

    def __init__(self, tower: Any, teacher_width: int) -> None:
        super().__init__()
        self.tower = tower
        width = tower.config.hidden_size
        self.of_text = nn.Linear(width, teacher_width, bias=False)
        self.of_word = nn.Linear(width, teacher_width, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Tokens [B, L] -> states after the last norm [B, L, D]."""
        return self.tower(ids).last_hidden_state


@dataclass(frozen=True)
class Batch:
    """Texts of one step.

    Attributes:
        ids: [B, L], padded with the end token.
        last: place of each text's end [B].
        ends: whether a word ends there, [B, L].
        words: row of that word in the table, [B, L]; any number elsewhere.
    """

    ids: Tensor
    last: Tensor
    ends: Tensor
    words: Tensor


def batch_of(some: Sequence[Lesson], length: int | None = None) -> Batch:
    """Lessons padded to the longest, or to `length`."""
    longest = length or max(len(one.ids) for one in some)
    end = some[0].ids[-1]
    words = torch.full((len(some), longest), -1)
    for row, one in enumerate(some):
        words[row, one.ends] = torch.tensor(one.words, dtype=torch.int64)
    ids = torch.tensor([one.ids + [end] * (longest - len(one.ids)) for one in some])
    last = torch.tensor([len(one.ids) - 1 for one in some])
    return Batch(ids, last, words >= 0, words.clamp(min=0))


def teaching_loss(model: Taught, batch: Batch, texts: Tensor, words: Tensor) -> dict[str, Tensor]:
    """One minus the cosine at the text's end and at each word's, and the texts' mutual cosines.

    Args:
        texts: the teacher's unit vectors of these texts [B, D].
        words: of all single words [W, D].
    """
    states = model(batch.ids).float()
    places = torch.arange(len(batch.last), device=states.device)
    ours = F.normalize(model.of_text(states[places, batch.last]).float(), dim=1)
    text = 1 - (ours * texts).sum(1).mean()
    mutual = (ours @ ours.T - texts @ texts.T).square().mean()
    read = F.normalize(model.of_word(states).float(), dim=-1)
    alike = (read * words[batch.words]).sum(-1)
    word = 1 - (alike * batch.ends).sum() / batch.ends.sum().clamp(min=1)
    return {"loss": text + 5 * mutual + 0.3 * word, "text": text, "mutual": mutual, "word": word}


@dataclass(frozen=True)
class Book:
    """Lessons to go on teaching with where the teacher is not: few numbers for each text.

    Attributes:
        texts, words: strings.
        weights: how often each text is read, relatively [N].
        of_texts, of_words: the teacher's vectors in fewer dimensions, unit length, [N, d], [W, d].
        turn: what reduces a vector of the teacher, [d, D].
    """

    texts: list[str]
    words: list[str]
    weights: Tensor
    of_texts: Tensor
    of_words: Tensor
    turn: Tensor

    def write(self, folder: Path) -> None:
        """Write the vectors in 8 bits and the strings as JSON; what was there is replaced."""
        vectors = {"of_texts": self.of_texts, "of_words": self.of_words}
        scale = max(float(v.abs().max()) for v in vectors.values()) / 127
        small = {k: (v / scale).round().to(torch.int8) for k, v in vectors.items()}
        small |= {"turn": self.turn, "weights": self.weights.to(torch.uint8)}
        save_tensors(small, folder / "book.safetensors", {}, replace=True)
        strings = json.dumps({"texts": self.texts, "words": self.words})
        write_text(folder / "book.json", strings, replace=True)

    @staticmethod
    def load(folder: Path) -> "Book":
        """Read a written one."""
        strings = json.loads((folder / "book.json").read_text("utf-8"))
        stored = load_file(folder / "book.safetensors")
        return Book(
            strings["texts"],
            strings["words"],
            stored["weights"].float(),
            F.normalize(stored["of_texts"].float(), dim=1),
            F.normalize(stored["of_words"].float(), dim=1),
            stored["turn"],
        )


def reduced(vectors: Tensor, others: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors [N, D] and [W, D] turned into the directions [size, D] in which the first vary most.

    The mean stays in: what cosines are of is kept as well as the size allows.
    """
    _, basis = torch.linalg.eigh(vectors.T @ vectors)
    turn = basis.flip(1)[:, :size].T.contiguous()
    return F.normalize(vectors @ turn.T, dim=1), F.normalize(others @ turn.T, dim=1), turn

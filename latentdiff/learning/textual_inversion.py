"""Textual inversion: new words for a CLIP text encoder, of which nothing but they is trained.

Gal et al. 2022, "An Image is Worth One Word", sec. 4.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.errors import UserError
from latentdiff.formats.weights import WeightFiles, may_replace, save_tensors
from latentdiff.models.clip_tokenizer import in_transformers
from latentdiff.models.conditioner import TextConditioner
from latentdiff.models.text_encoders import ClipTower


class WordRows(nn.Module):
    """An embedding table that stays as it is, and trained rows for the ids from `first` on."""

    def __init__(self, table: nn.Embedding, first: int, start: Tensor) -> None:
        super().__init__()
        self.table = table.requires_grad_(False)
        self.first = first
        self.rows = nn.Parameter(start.detach().float().clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, L] -> [B, L, D]."""
        place = ids - self.first
        new = (place >= 0) & (place < len(self.rows))
        known = self.table(ids.masked_fill(new, 0))
        learned = F.embedding(place.clamp(0, len(self.rows) - 1), self.rows)
        return torch.where(new[..., None], learned.to(known.dtype), known)

    def merged(self) -> nn.Embedding:
        """One plain table with the rows in it."""
        count = max(self.table.num_embeddings, self.first + len(self.rows))
        weight = self.table.weight.new_zeros(count, self.table.embedding_dim)
        weight[: self.table.num_embeddings] = self.table.weight
        weight[self.first : self.first + len(self.rows)] = self.rows.detach()
        return nn.Embedding.from_pretrained(weight)


def add_words(bundle: Bundle, tokens: Sequence[str], start_from: str | None = None) -> Bundle:
    """A model with new words; their rows are all in its text encoder that require gradients.

    Args:
        bundle: the model; its text encoder is changed in place.
        tokens: the words, one token each.
        start_from: a known word whose meaning they start from; None: the mean of all.

    Raises:
        UserError: no CLIP text encoder, a word that it has already, or two that it reads as one.
    """
    tower = clip_of(bundle)
    tokenizer = in_transformers(tower.tokenizer)
    tower = ClipTower(tower.model, tokenizer)
    bundle = replace(bundle, conditioner=TextConditioner(tower))
    backend = tokenizer.backend_tokenizer
    known = backend.get_vocab()
    for token in tokens:
        whole = len(_ids(bundle, token)) < 2  # "heart" is "heart</w>" in the vocabulary
        if whole or token in known or token != token.strip():
            raise UserError(f"{token!r} cannot be a new word: take one like <my-style>")
    table = tower.model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    ids = backend.encode(start_from).ids[1:-1] if start_from else []
    start = table.weight[ids or slice(None)].mean(0)
    first = max(known.values()) + 1
    tokenizer.add_tokens(list(tokens))
    for number, token in enumerate(tokens, first):
        if _ids(bundle, token) != [number]:
            raise UserError(
                f"{token!r} would not be a word of its own: give each new word once (capitals do "
                "not tell words apart)"
            )
    tower.model.requires_grad_(False)
    tower.model.set_input_embeddings(WordRows(table, first, start.repeat(len(tokens), 1)))
    tower.model.config.vocab_size = max(table.num_embeddings, first + len(tokens))
    return replace(bundle, conditioner=TextConditioner(ClipTower(tower.model, tokenizer)))


def clip_of(bundle: Bundle) -> ClipTower:
    """The one CLIP text encoder of a model.

    Raises:
        UserError: it has another, or several.
    """
    conditioner = bundle.conditioner
    if not isinstance(conditioner, TextConditioner) or not isinstance(conditioner.tower, ClipTower):
        raise UserError("only a CLIP text encoder can learn new words")
    return conditioner.tower


def _ids(bundle: Bundle, token: str) -> list[int]:
    return clip_of(bundle).tokenizer.backend_tokenizer.encode(token, add_special_tokens=False).ids


def save_words(bundle: Bundle, tokens: Sequence[str], folder: Path) -> list[Path]:
    """The learned rows as files for diffusers' `load_textual_inversion`, which takes one word each.

    A file that holds one such row is replaced.

    Args:
        tokens: the words, in the order in which they were added.

    Returns:
        `learned_embeds.safetensors`; of several words, `learned_embeds-1.safetensors` and so on.

    Raises:
        UserError: they cannot be written, or something else has the name of one.
    """
    words = clip_of(bundle).model.get_input_embeddings()
    assert isinstance(words, WordRows)
    rows = words.rows.detach().cpu()
    paths: list[Path] = []
    for number, (token, row) in enumerate(zip(tokens, rows, strict=True), start=1):
        place = "" if len(tokens) == 1 else f"-{number}"
        paths.append(folder / f"learned_embeds{place}.safetensors")
        replace = may_replace(paths[-1], "a file of a learned word", _recognise)
        save_tensors({token: row.clone()}, paths[-1], {}, replace=replace)
    return paths


def _recognise(path: Path) -> None:
    if [len(shape) for shape in WeightFiles([path]).shapes.values()] != [1]:
        raise UserError("it holds no learned word.")


def with_learned_words(bundle: Bundle) -> Bundle:
    """The model with the learned rows in a plain table, to be saved; `bundle` stays as it is."""
    tower = clip_of(bundle)
    model = copy.deepcopy(tower.model)
    words = model.get_input_embeddings()
    assert isinstance(words, WordRows)
    model.set_input_embeddings(words.merged())
    return replace(bundle, conditioner=TextConditioner(ClipTower(model, tower.tokenizer)))


def check_words(tokens: Sequence[str], captions: Sequence[str]) -> None:
    """A new word can be learned only from captions that hold it.

    Raises:
        UserError: no caption holds one.
    """
    for token in tokens:
        if not any(token in caption for caption in captions):
            raise UserError(
                f"no caption holds {token}: --instance-prompt 'a picture in {token} style'"
            )

"""Textual inversion: new words for a CLIP text encoder, of which nothing but they is trained.

Gal et al. 2022, "An Image is Worth One Word", sec. 4.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.errors import UserError
from latentdiff.formats.embeddings import SIDES, WORD
from latentdiff.formats.weights import WeightFiles, may_replace, save_tensors
from latentdiff.models.clip_tokenizer import in_transformers
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
    """A model with new words; their rows are all in its text encoders that require gradients.

    Args:
        bundle: the model; its text encoders are changed in place.
        tokens: the words, one token each.
        start_from: a known word whose meaning they start from; None: the mean of all.

    Raises:
        UserError: no CLIP text encoder, a word that one has already, or two that it reads as one.
    """
    taught = {name: _taught(tower, tokens, start_from) for name, tower in clips_of(bundle).items()}
    return replace(bundle, conditioner=bundle.conditioner.with_towers(taught))


def _taught(tower: ClipTower, tokens: Sequence[str], start_from: str | None) -> ClipTower:
    """A text encoder with new words; see `add_words`."""
    tokenizer = in_transformers(tower.tokenizer)
    backend = tokenizer.backend_tokenizer
    known = backend.get_vocab()
    for token in tokens:
        whole = len(_ids(tokenizer, token)) < 2  # "heart" is "heart</w>" in the vocabulary
        if whole or token in known or token != token.strip():
            raise UserError(f"{token!r} cannot be a new word: take one like <my-style>")
    table = tower.model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    ids = backend.encode(start_from).ids[1:-1] if start_from else []
    start = table.weight[ids or slice(None)].mean(0)
    first = max(known.values()) + 1
    tokenizer.add_tokens(list(tokens))
    for number, token in enumerate(tokens, first):
        if _ids(tokenizer, token) != [number]:
            raise UserError(
                f"{token!r} would not be a word of its own: give each new word once (capitals do "
                "not tell words apart)"
            )
    tower.model.requires_grad_(False)
    tower.model.set_input_embeddings(WordRows(table, first, start.repeat(len(tokens), 1)))
    tower.model.config.vocab_size = max(table.num_embeddings, first + len(tokens))
    if tower.model.config.eos_token_id == 2:  # by which transformers takes the largest id for it
        tower.model.config.eos_token_id = known[str(tokenizer.eos_token)]
    return type(tower)(tower.model, tokenizer)


def clips_of(bundle: Bundle) -> dict[str, ClipTower]:
    """The CLIP text encoders of a model.

    Raises:
        UserError: it has another.
    """
    towers: dict[str, ClipTower] = {}
    for name, tower in bundle.conditioner.towers.items():
        if not isinstance(tower, ClipTower):
            raise UserError("only a CLIP text encoder can learn new words")
        towers[name] = tower
    return towers


def _ids(tokenizer: Any, token: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(token, add_special_tokens=False).ids


def word_files(tokens: Sequence[str]) -> list[str]:
    """The names of the files of learned words, one of each."""
    places = [""] if len(tokens) == 1 else [f"-{number + 1}" for number in range(len(tokens))]
    return [f"learned_embeds{place}.safetensors" for place in places]


def save_words(bundle: Bundle, tokens: Sequence[str], folder: Path) -> list[Path]:
    """The learned rows as files of one word each.

    Of a model with one text encoder they are for diffusers' `load_textual_inversion`. Those of
    Stable Diffusion XL hold a row for each encoder, "clip_l" and "clip_g", as ComfyUI and A1111
    read them, whose word is the file's name. A file that holds one such word is replaced.

    Args:
        tokens: the words, in the order in which they were added.

    Returns:
        `learned_embeds.safetensors`; of several words, `learned_embeds-1.safetensors` and so on.

    Raises:
        UserError: they cannot be written, or something else has the name of one.
    """
    rows: dict[str, Tensor] = {}
    for name, tower in clips_of(bundle).items():
        words = tower.model.get_input_embeddings()
        assert isinstance(words, WordRows)
        rows[SIDES[name]] = words.rows.detach().cpu()
    paths: list[Path] = []
    for number, (name, token) in enumerate(zip(word_files(tokens), tokens, strict=True)):
        paths.append(folder / name)
        replace = may_replace(paths[-1], "a file of a learned word", _recognise)
        own = {part: each[number : number + 1].clone() for part, each in rows.items()}
        if own.keys() == {"clip_l"}:
            own = {token: own["clip_l"][0]}
        save_tensors(own, paths[-1], {WORD: token}, replace=replace)
    return paths


def _recognise(path: Path) -> None:
    shapes = WeightFiles([path]).shapes
    both = shapes and shapes.keys() <= set(SIDES.values())
    if both and all(len(shape) == 2 for shape in shapes.values()):
        return
    if [len(shape) for shape in shapes.values()] != [1]:
        raise UserError("it holds no learned word.")


def with_learned_words(bundle: Bundle) -> Bundle:
    """The model with the learned rows in plain tables, to be saved; `bundle` stays as it is."""
    plain: dict[str, ClipTower] = {}
    for name, tower in clips_of(bundle).items():
        model = copy.deepcopy(tower.model)
        words = model.get_input_embeddings()
        assert isinstance(words, WordRows)
        model.set_input_embeddings(words.merged())
        plain[name] = type(tower)(model, tower.tokenizer)
    return replace(bundle, conditioner=bundle.conditioner.with_towers(plain))


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

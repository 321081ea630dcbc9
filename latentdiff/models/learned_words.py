"""Learned words (textual inversion) in a CLIP text encoder: further tokens with rows of their own.

Gal et al. 2022, "An Image is Worth One Word".
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.models.clip_tokenizer import in_transformers
from latentdiff.models.text_encoders import ClipTower


def with_words(tower: ClipTower, words: Mapping[str, Tensor]) -> ClipTower:
    """A tower that knows these words, too; the given one stays as it is, and shares its tensors.

    Args:
        tower: the encoder with its tokenizer.
        words: rows [n, D] of each; a word of several is read as the tokens `WORD`, `WORD_1`, ... of
            diffusers, one after the other.

    Raises:
        UserError: the tower knows a word already, or reads it as no word of its own.
    """
    tokenizer = in_transformers(tower.tokenizer)
    backend = tokenizer.backend_tokenizer
    tokens: list[str] = []
    for word, rows in words.items():
        known = backend.get_vocab()
        # "heart" is "heart</w>" in the vocabulary: one token already.
        whole = len(backend.encode(word, add_special_tokens=False).ids) < 2
        series = [word, *(f"{word}_{number}" for number in range(1, len(rows)))]
        if whole or word != word.strip() or not known.keys().isdisjoint(series):
            raise UserError(
                f"{word!r} cannot be a learned word: the model has it, or it is not one word; give "
                "it another name, such as <my-style>."
            )
        tokenizer.add_tokens(series)
        tokens += series
    table = tower.model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    vocabulary = backend.get_vocab()
    for token in tokens:
        if backend.encode(token, add_special_tokens=False).ids[:1] != [vocabulary[token]]:
            raise UserError(f"{token!r} cannot be a learned word: the tokenizer takes it apart.")
    count = max(table.num_embeddings, *(vocabulary[token] + 1 for token in tokens))
    weight = table.weight.new_zeros(count, table.embedding_dim)
    weight[: table.num_embeddings] = table.weight.detach()
    places = torch.tensor([vocabulary[token] for token in tokens])
    weight[places.to(weight.device)] = torch.cat(list(words.values())).to(weight)
    shared: dict[int, Any] = {id(t): t for t in (*tower.model.parameters(), *tower.model.buffers())}
    model = copy.deepcopy(tower.model, shared)
    model.set_input_embeddings(nn.Embedding.from_pretrained(weight))
    model.config.vocab_size = count
    if model.config.eos_token_id == 2:  # by which transformers takes the largest id for it
        model.config.eos_token_id = vocabulary[str(tokenizer.eos_token)]
    return type(tower)(model, tokenizer)

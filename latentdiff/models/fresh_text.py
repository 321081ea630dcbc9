"""A small CLIP text tower of one's own: a byte-level BPE tokenizer and a fresh encoder."""

import json
from collections.abc import Iterable

from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def train_tokenizer(captions: Iterable[str], vocabulary: int, window: int) -> CLIPTokenizer:
    """Learn a CLIP-style byte-level BPE (Radford et al. 2021, sec. 2.4) from captions.

    Every byte is a token, inside a word and at its end, so any text encodes. The vocabulary has
    CLIP's order: bytes, bytes that end a word, merges, start, end.

    Args:
        vocabulary: most tokens in all; at least 514.
        window: `model_max_length`, in tokens, start and end included.

    Raises:
        ValueError: the vocabulary cannot hold all bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [byte + WORD_END for byte in alphabet]
    if vocabulary < len(base) + 2:
        raise ValueError(f"a byte-level vocabulary needs at least {len(base) + 2} tokens")
    learner = CLIPTokenizer().backend_tokenizer
    learner.model = BPE(end_of_word_suffix=WORD_END)
    trainer = BpeTrainer(
        vocab_size=vocabulary - 2,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = _merges(learner.to_str())[: vocabulary - len(base) - 2]
    tokens = [*base, *("".join(pair) for pair in merges), START, END]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=window)  # pyright: ignore[reportArgumentType]


def _merges(tokenizer: str) -> list[tuple[str, str]]:
    """The merge list out of a serialised tokenizer."""
    return [(left, right) for left, right in json.loads(tokenizer)["model"]["merges"]]


def build_text_encoder(
    tokenizer: CLIPTokenizer, width: int, layers: int, heads: int
) -> CLIPTextModel:
    """A fresh CLIP text encoder for this tokenizer; its states are [B, window, width]."""
    vocabulary = tokenizer.get_vocab()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )
    return CLIPTextModel(config)

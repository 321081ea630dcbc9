"""T5's tokenizer by the tokenizers library alone; see `latentdiff.models.clip_tokenizer`."""

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from latentdiff.files import scratch_folder

if TYPE_CHECKING:
    from transformers.models.t5.tokenization_t5 import T5Tokenizer as TheirT5Tokenizer

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
"""The first three pieces of T5's vocabulary."""


class T5Tokenizer:
    """Texts to ids by a unigram language model: Kudo 2018, sec. 3.2.

    Attributes:
        backend_tokenizer: of the tokenizers library.
        model_max_length: the most tokens of a text, by its config.
        pad_token: what fills texts up to the longest.

    Args:
        vocabulary: pieces with their scores; the first are `PAD`, `END` and `UNKNOWN`.
        charsmap: how SentencePiece normalises characters; None leaves them as they are.
        special: pieces that a text may name.
        window: `model_max_length`.

    Raises:
        ValueError: the vocabulary begins with other pieces.
    """

    transformers_name = "T5Tokenizer"

    def __init__(
        self,
        vocabulary: Sequence[tuple[str, float]],
        charsmap: bytes | None,
        special: Iterable[str],
        window: int,
    ) -> None:
        if [piece for piece, _ in vocabulary[:3]] != [PAD, END, UNKNOWN]:
            raise ValueError(f"its vocabulary does not begin with {PAD}, {END} and {UNKNOWN}")
        # Its attributes have no setters in the library's types.
        backend: Any = Tokenizer(Unigram(list(vocabulary), unk_id=2, byte_fallback=False))
        if charsmap is not None:
            backend.normalizer = normalizers.Precompiled(charsmap)
        spaces: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always", "split": True}
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
        )
        backend.decoder = decoders.Metaspace(**spaces)
        tokens = [AddedToken(piece, normalized=False, special=True) for piece in special]
        backend.add_special_tokens(tokens)
        backend.post_processor = processors.TemplateProcessing(
            single=["$A", END],
            pair=["$A", END, "$B", END],
            special_tokens=[(END, backend.token_to_id(END))],
        )
        self.backend_tokenizer = backend
        self.model_max_length = window
        self.pad_token = PAD
        self._special = [token.content for token in tokens]

    @property
    def pad_token_id(self) -> int | None:
        """The id of `pad_token`."""
        return self.backend_tokenizer.token_to_id(self.pad_token)

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The special tokens and their ids."""
        return {token: self.backend_tokenizer.token_to_id(token) for token in self._special}

    def in_transformers(self) -> "TheirT5Tokenizer":
        """The same tokenizer as an object of transformers."""
        from transformers.models.t5.tokenization_t5 import T5Tokenizer as Theirs

        further = [token for token in self._special if token not in (PAD, END, UNKNOWN)]
        config = {
            "extra_ids": len(further),
            "extra_special_tokens": further,
            "model_max_length": self.model_max_length,
            "pad_token": self.pad_token,
        }
        with scratch_folder() as scratch:
            (scratch / "tokenizer.json").write_text(self.backend_tokenizer.to_str(), "utf-8")
            (scratch / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
            return Theirs.from_pretrained(scratch, local_files_only=True)

"""CLIP's tokenizer by the tokenizers library alone.

Importing transformers takes longer than drawing a small picture. A folder of which transformers'
CLIPTokenizer might make another tokenizer is left to that class.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from latentdiff.files import scratch_folder
from latentdiff.models.t5_tokenizer import T5Tokenizer

if TYPE_CHECKING:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
# Of a tokenizer_config.json; they change nothing, or only calls that are not made here.
_IDLE = {"backend", "is_local", "local_files_only", "max_length", "stride", "tokenizer_class"}
_IDLE |= {"truncation_side", "truncation_strategy", "add_prefix_space", "errors", "name_or_path"}
_IDLE |= {"clean_up_tokenization_spaces", "special_tokens_map_file", "do_lower_case"}

_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
    """Texts to ids by byte-level BPE: Radford et al. 2021, sec. 2.4.

    Attributes:
        backend_tokenizer: of the tokenizers library.
        model_max_length: the most tokens of a text, by its config.
        pad_token: what fills the window.

    Args:
        vocabulary: tokens and their ids.
        merges: pairs of tokens, the most frequent first.
        tokens: the special tokens, by the names of `_TOKENS`.
        window: `model_max_length`.
    """

    transformers_name = "CLIPTokenizer"

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: list[tuple[str, str]],
        tokens: Mapping[str, AddedToken],
        window: int,
    ) -> None:
        start, end, unknown, pad = (tokens[name].content for name in _TOKENS)
        model = BPE(
            vocab=dict(vocabulary),
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=unknown,
        )
        backend: Any = Tokenizer(model)  # its attributes have no setters in the library's types
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        special = {token.content: token for token in tokens.values()}
        backend.add_special_tokens(list(special.values()))
        ends = (end, vocabulary[end]), (start, vocabulary[start])
        backend.post_processor = processors.RobertaProcessing(
            *ends, trim_offsets=False, add_prefix_space=False
        )
        self.backend_tokenizer = backend
        self.model_max_length = window
        self.pad_token = pad
        self._tokens = dict(tokens)

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any]) -> Self | None:
        """The tokenizer of a folder with this `tokenizer_config.json`.

        None where transformers' class would make another one of the folder, or might.

        Raises:
            ValueError, KeyError, TypeError, OSError: the files hold no tokenizer.
        """
        if not config.keys() <= _TOKENS.keys() | _IDLE | {"model_max_length"}:
            return None
        tokens = {name: _token(config.get(name, usual)) for name, usual in _TOKENS.items()}
        beside = folder / "special_tokens_map.json"
        told = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
        same = all(name in tokens and _token(told[name]) == tokens[name] for name in told)
        if not same or (folder / "added_tokens.json").exists():
            return None
        if (folder / "tokenizer.json").is_file():
            whole = json.loads((folder / "tokenizer.json").read_text("utf-8"))
            vocabulary, pairs = whole["model"]["vocab"], whole["model"]["merges"]
            added = [_token(token) for token in whole["added_tokens"]]
            if whole["truncation"] or whole["padding"]:
                return None
        else:
            vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
            lines = (folder / "merges.txt").read_text("utf-8").split("\n")
            pairs, added = [line for line in lines[1:] if line], []
        special = {token.content: token for token in tokens.values()}  # the last one counts
        if not special.keys() <= vocabulary.keys():
            return None
        if any(token != special.get(token.content) for token in added):
            return None
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in pairs)
        merges = [(first, second) for first, second in pairs]
        return cls(vocabulary, merges, tokens, config.get("model_max_length", int(1e30)))

    @property
    def pad_token_id(self) -> int | None:
        """The id of `pad_token`."""
        return self.backend_tokenizer.token_to_id(self.pad_token)

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The special tokens and their ids."""
        special = [token.content for token in self._tokens.values()]
        return {token: self.backend_tokenizer.token_to_id(token) for token in special}

    def in_transformers(self) -> "CLIPTokenizer":
        """The same tokenizer as an object of transformers."""
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

        with scratch_folder() as scratch:
            (scratch / "tokenizer.json").write_text(self.backend_tokenizer.to_str(), "utf-8")
            config: dict[str, Any] = {name: _told(token) for name, token in self._tokens.items()}
            if self.pad_token != self._tokens["pad_token"].content:
                config["pad_token"] = self.pad_token
            config |= {"model_max_length": self.model_max_length}
            (scratch / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
            return CLIPTokenizer.from_pretrained(scratch, local_files_only=True)


def in_transformers(
    tokenizer: "ClipTokenizer | T5Tokenizer | TokenizersBackend",
) -> "TokenizersBackend":
    """A copy of a tokenizer as an object of transformers, to be changed or saved."""
    if isinstance(tokenizer, ClipTokenizer | T5Tokenizer):
        return tokenizer.in_transformers()
    return copy.deepcopy(tokenizer)


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def _token(told: Any) -> AddedToken:
    """A special token, as text or as transformers writes an object of its library."""
    if isinstance(told, str):
        return AddedToken(told, normalized=False, special=True)
    flags = {name: bool(told[name]) for name in _FLAGS}
    return AddedToken(told["content"], special=True, **flags)


def _told(token: AddedToken) -> dict[str, object]:
    flags = {name: getattr(token, name) for name in _FLAGS}
    return {"__type": "AddedToken", "content": token.content, **flags}

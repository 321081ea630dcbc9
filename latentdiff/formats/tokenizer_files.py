"""The tokenizer of a model folder, bounded in time and memory whatever its files hold.

A `tokenizer.json` is a program: replacements one after the other turn forty characters into
gigabytes, patterns run for ages, and the library that runs it panics. So its parts are taken from a
list of those that cannot, and how much longer they can make a text is bounded.
"""

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from latentdiff.errors import UserError
from latentdiff.formats.sentencepiece_file import read_vocabulary
from latentdiff.formats.weights import first_line, read_json
from latentdiff.models.clip_tokenizer import ClipTokenizer
from latentdiff.models.t5_tokenizer import END, PAD, UNKNOWN, T5Tokenizer
from latentdiff.reading import open_regular, reason

if TYPE_CHECKING:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    from latentdiff.models.text_encoders import Tokenizer

_MOST_PARTS = 32
_MOST_SENTINELS = 1000
_MOST_BYTES = 64 * 2**20
# A prompt of 10,000 characters then has some millions. T5's normalizers are bounded by about 66.
_MOST_GROWTH = 256
_PRE_TOKENIZERS = {"BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace"}
_PRE_TOKENIZERS |= {"Punctuation", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"}
_POST_PROCESSORS = {"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"}
_MODELS = {"BPE", "Unigram", "WordLevel", "WordPiece"}
_LONGEST_PATTERN = 200
# Characters, each perhaps with "?"; at the end perhaps a repetition, greedy or not.
_ALTERNATIVE = re.compile(
    r"(?:[^][()\\*+?{}]\??)*(?:(?:[*+]|\{\d{1,2},?\d{0,2}\})[?+]?)?", re.DOTALL
)
# How many characters each makes of one, at most.
_GROWTH = {"BertNormalizer": 3, "ByteLevel": 4, "Lowercase": 3, "NFC": 3, "NFD": 4, "NFKC": 18}
_GROWTH |= {"NFKD": 18, "Nmt": 1, "Strip": 1, "StripAccents": 1}


def load_tokenizer(folder: Path, customary: str) -> "Tokenizer":
    """The tokenizer of tokenizer/.

    BPE's dropout and Unigram's sampling, which are for training, are left out: with them a seed
    would draw another picture each time.

    Args:
        folder: with tokenizer.json, or with vocab.json and merges.txt, or T5's with spiece.model.
        customary: transformers' class of a folder that does not name its own.

    Raises:
        UserError: missing, damaged, of a class that has no fast version, or able to run away.
    """
    _check_files(folder)
    config = folder / "tokenizer_config.json"
    told = read_json(config) if config.is_file() else {}
    named = str(told.get("tokenizer_class") or "").removesuffix("Fast") or customary
    whole = folder / "tokenizer.json"
    others = ("merges.txt", "spiece.model") if named == "T5Tokenizer" else ("merges.txt",)
    if not whole.is_file() and not any((folder / name).is_file() for name in others):
        raise UserError(f"{whole}: no such file; a model folder needs it.")

    def read() -> "Tokenizer":
        if named == "CLIPTokenizer" and (own := ClipTokenizer.read(folder, told)):
            return own
        if whole.is_file():
            _check(read_json(whole))
        if named == "T5Tokenizer" and (own := read_t5(folder, told)):
            return own
        return _tokenizer_class(named).from_pretrained(folder, local_files_only=True)

    tokenizer = _refusing(read, folder)
    model: Any = tokenizer.backend_tokenizer.model
    for setting in {"dropout", "alpha", "nbest_size"} & set(dir(model)):
        setattr(model, setting, None)
    return tokenizer


def _check_files(folder: Path) -> None:
    """Check that each file of a folder is regular and of bounded size, before any library reads it.

    Raises:
        UserError: a file is a pipe or a device, or is too large.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            if not path.is_dir():
                open_regular(path, _MOST_BYTES).close()
        except OSError as error:
            raise UserError(f"{path}: {reason(error)}.") from error


def _refusing(read: Callable[[], "Tokenizer"], folder: Path) -> "Tokenizer":
    try:
        return read()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # bare ones of tokenizers, and Rust's panics, no `Exception`s
        raise UserError(f"{folder}: it holds no usable tokenizer ({first_line(error)}).") from error


def _tokenizer_class(name: str) -> "type[TokenizersBackend]":
    """Find a tokenizer class by name; never run code that comes with a checkpoint."""
    if name == "CLIPTokenizer":
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

        return CLIPTokenizer
    if name == "T5Tokenizer":
        from transformers.models.t5.tokenization_t5 import T5Tokenizer

        return T5Tokenizer
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    return TokenizersBackend


# Of a tokenizer_config.json of T5; they change nothing, or only calls that are not made here.
_IDLE = {"backend", "is_local", "local_files_only", "tokenizer_class", "name_or_path", "legacy"}
_IDLE |= {"clean_up_tokenization_spaces", "special_tokens_map_file", "truncation_side"}
_T5_TOKENS = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
_FURTHER = ("extra_special_tokens", "additional_special_tokens")
_DECODER, _ADDED = "added_tokens_decoder", "added_tokens.json"


def read_t5(folder: Path, config: Mapping[str, Any]) -> T5Tokenizer | None:
    """T5's own tokenizer of a folder with this `tokenizer_config.json`.

    None where transformers' class would make another one of a `tokenizer.json`, or might.

    Raises:
        UserError, ValueError, KeyError, TypeError: the files hold no tokenizer, or settings beside
            a `spiece.model` that are not T5's.
    """
    window = config.get("model_max_length", int(1e30))
    usual = [*_T5_TOKENS.values(), *_sentinels(config)]
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _of_sentencepiece(folder, config, usual, window)
    whole = json.loads(path.read_text("utf-8"))
    normalizer = whole["normalizer"] or {"type": None}
    if whole["model"]["type"] != "Unigram" or normalizer["type"] not in (None, "Precompiled"):
        return None
    added = {str(token.pop("id")): token for token in whole["added_tokens"]}
    named = [token["content"] for token in added.values()]
    same = all(added.get(key) == token for key, token in config.get(_DECODER, {}).items())
    plain = not _odd(folder, config) and not (folder / _ADDED).exists()
    if not plain or not same or sorted(named) != sorted(usual):
        return None
    packed = normalizer.get("precompiled_charsmap")
    charsmap = None if packed is None else base64.b64decode(packed)
    vocabulary = [(piece, score) for piece, score in whole["model"]["vocab"]]
    own = T5Tokenizer(vocabulary, charsmap, named, window)
    told = tokenizers.Tokenizer.from_file(str(path))  # in the spelling of today
    return own if own.backend_tokenizer.to_str() == told.to_str() else None


def _of_sentencepiece(
    folder: Path, config: Mapping[str, Any], usual: list[str], window: int
) -> T5Tokenizer:
    """The tokenizer of a `spiece.model`, behind whose pieces the sentinels stand, the last first.

    Raises:
        UserError, ValueError, KeyError, TypeError: see `read_t5`.
    """
    if odd := _odd(folder, config):
        raise UserError(f"its {odd} does not load here beside a spiece.model")
    read = read_vocabulary(folder / "spiece.model")
    vocabulary = [*read.pieces, *((piece, 0.0) for piece in reversed(usual[3:]))]
    beside = folder / _ADDED
    told: dict[Any, Any]
    told = {int(key): token["content"] for key, token in config.get(_DECODER, {}).items()}
    told |= {key: token for token, key in (read_json(beside) if beside.is_file() else {}).items()}
    for number, piece in told.items():
        if not 0 <= number < len(vocabulary) or vocabulary[number][0] != piece:
            raise UserError(f"its token {piece!r:.40} has an id that is not T5's")
    own = T5Tokenizer(vocabulary, read.charsmap, usual, window)
    _check(json.loads(own.backend_tokenizer.to_str()))
    return own


def _sentinels(config: Mapping[str, Any]) -> list[str]:
    """T5's own special tokens beside those of `_T5_TOKENS`, in their order.

    Raises:
        UserError: their count makes no sense.
    """
    count = config.get("extra_ids", 100)
    if not isinstance(count, int) or not 0 <= count <= _MOST_SENTINELS:
        raise UserError(f"extra_ids is {count!r:.40}; it must be 0 .. {_MOST_SENTINELS}")
    return [f"<extra_id_{number}>" for number in range(count)]


def _odd(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The key by which a folder asks for another tokenizer than T5's; None if none does."""
    beside = folder / "special_tokens_map.json"
    for told in (config, read_json(beside) if beside.is_file() else {}):
        for name, usual in _T5_TOKENS.items():
            if _content(told.get(name, usual)) != usual:
                return name
        for name in _FURTHER:
            listed: Any = told.get(name)
            if listed and sorted(map(_content, listed)) != sorted(_sentinels(config)):
                return name
    if config.get("sp_model_kwargs"):
        return "sp_model_kwargs"
    known = {*_IDLE, *_FURTHER, *_T5_TOKENS, _DECODER, "sp_model_kwargs", "extra_ids"}
    return next((key for key in config if key not in known | {"model_max_length"}), None)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _check(whole: Mapping[str, Any]) -> None:
    """Check the parts of a `tokenizer.json`.

    Raises:
        UserError: a part is not known, or can make texts too long or take too long.
    """
    if (model := (whole.get("model") or {}).get("type", "BPE")) not in _MODELS:
        raise UserError(f"model {model!s:.40} is none that works here")
    growth = 1
    for part in _parts(whole.get("normalizer"), "normalizers"):
        growth *= _growth(part)
        if growth > _MOST_GROWTH:
            raise UserError("its normalizers can make a text too long")
    for part in _parts(whole.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") not in _PRE_TOKENIZERS:
            raise UserError(f"pre-tokenizer {part.get('type')!s:.40} is none that works here")
        _check_pattern(part)
    for part in _parts(whole.get("post_processor"), "processors"):
        if part.get("type") not in _POST_PROCESSORS:
            raise UserError(f"post-processor {part.get('type')!s:.40} is none that works here")
        texts = [piece for piece in part.get("single") or () if "Sequence" in piece]
        if len(texts) > 1:
            raise UserError("its post-processor repeats the text")


def _parts(value: Any, inside: str) -> Iterator[Mapping[str, Any]]:
    """The parts of a pipeline in their order, nested sequences flattened."""
    waiting, count = [value] if value else [], 0
    while waiting:
        part = waiting.pop(0)
        count += 1
        if not isinstance(part, dict) or count > _MOST_PARTS:
            raise UserError(f"its {inside} are none that work here")
        if part.get("type") == "Sequence":
            waiting = [*part[inside], *waiting]
        else:
            yield part


def _growth(part: Mapping[str, Any]) -> int:
    """Count the characters that a normalizer makes of one, at most."""
    kind = part.get("type")
    if kind == "Replace":
        _check_pattern(part)
        return 1 + len(part["content"])
    if kind == "Prepend":
        return 1 + len(part["prepend"])
    if kind == "Precompiled":  # a trie with its size before it, and what its ends stand for
        raw = base64.b64decode(part["precompiled_charsmap"])
        start = 4 + int.from_bytes(raw[:4], "little")
        if len(raw) <= start:
            raise UserError("its precompiled_charsmap is cut short")
        return max(1, *map(len, raw[start:].split(b"\0")))
    if kind not in _GROWTH:
        raise UserError(f"normalizer {kind!s:.40} is none that works here")
    return _GROWTH[kind]


def _check_pattern(part: Mapping[str, Any]) -> None:
    """Pass patterns whose time is linear in the text: alternatives without groups, each with at
    most one repetition, at its end, where nothing behind it can fail, and two "?" at most.

    Raises:
        UserError: another one.
    """
    pattern = part.get("pattern")
    if pattern is None:
        return
    regex = pattern.get("Regex")
    if regex is None:
        if not pattern.get("String"):
            raise UserError("a pattern of nothing")
        return
    bare = re.sub(r"\\[pP]\{[^{}]*\}|\\[^A-Za-z0-9]|\\[dDsSwWnrtfv]", "x", regex, flags=re.DOTALL)
    bare = re.sub(r"\[[^\[\]\\]+\]", "x", bare)
    sound = (_ALTERNATIVE.fullmatch(one) and one.count("?") <= 2 for one in bare.split("|"))
    if not bare or len(regex) > _LONGEST_PATTERN or not all(sound):
        raise UserError(f"the pattern {regex!r:.60} might take ages")

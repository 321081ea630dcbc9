"""The tokenizer of a model folder, bounded in time and memory whatever its files hold.

A `tokenizer.json` is a program: replacements one after the other turn forty characters into
gigabytes, patterns run for ages, and the library that runs it panics. So its parts are taken from a
list of those that cannot, and how much longer they can make a text is bounded.
"""

import base64
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError
from latentdiff.formats.weights import first_line, read_json
from latentdiff.models.clip_tokenizer import ClipTokenizer
from latentdiff.reading import open_regular, reason

if TYPE_CHECKING:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

_MOST_PARTS = 32
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


def load_tokenizer(folder: Path, customary: str) -> "ClipTokenizer | TokenizersBackend":
    """The tokenizer of tokenizer/.

    BPE's dropout and Unigram's sampling, which are for training, are left out: with them a seed
    would draw another picture each time.

    Args:
        folder: with tokenizer.json, or with vocab.json and merges.txt.
        customary: transformers' class of a folder that does not name its own.

    Raises:
        UserError: missing, damaged, of a class that has no fast version, or able to run away.
    """
    _check_files(folder)
    config = folder / "tokenizer_config.json"
    told = read_json(config) if config.is_file() else {}
    named = str(told.get("tokenizer_class") or "").removesuffix("Fast") or customary
    whole = folder / "tokenizer.json"
    if not whole.is_file() and not (folder / "merges.txt").is_file():
        raise UserError(f"{whole}: no such file; a model folder needs it.")

    def read() -> "ClipTokenizer | TokenizersBackend":
        if named == "CLIPTokenizer" and (own := ClipTokenizer.read(folder, told)):
            return own
        if whole.is_file():
            _check(read_json(whole))
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


def _refusing(
    read: Callable[[], "ClipTokenizer | TokenizersBackend"], folder: Path
) -> "ClipTokenizer | TokenizersBackend":
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
    """How many characters a normalizer makes of one, at most."""
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

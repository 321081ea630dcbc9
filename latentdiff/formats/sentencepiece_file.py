"""A vocabulary of SentencePiece (`spiece.model`), which is a message of protocol buffers.

Only what T5's tokenizer is made of is read: the library of SentencePiece is not needed for that.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentdiff.errors import UserError
from latentdiff.reading import read_bytes

_MOST_BYTES = 16 * 2**20
_UNIGRAM = 1
# Numbers of the fields in sentencepiece_model.proto.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE = 1, 2
_CHARSMAP = 2
# Switches of the trainer and the normalizer, with the values that they have in T5's.
_TRAINED = {"model_type": (3, _UNIGRAM), "treat_whitespace_as_suffix": (24, 0)}
_TRAINED |= {"byte_fallback": (35, 0)}
_NORMALIZED = {"add_dummy_prefix": (3, 1), "remove_extra_whitespaces": (4, 1)}
_NORMALIZED |= {"escape_whitespaces": (5, 1)}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Pieces of a sentencepiece file, and how it normalises characters.

    Attributes:
        pieces: with their scores, in the order of their ids.
        charsmap: how characters are normalised first; None if they are not.
    """

    pieces: list[tuple[str, float]]
    charsmap: bytes | None


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a unigram language model that reads texts as T5's does.

    Raises:
        UserError: it is damaged, or of another kind.
        OSError: it cannot be read.
    """
    pieces: list[tuple[str, float]] = []
    charsmap: bytes | None = None
    for number, value in _fields(read_bytes(path, _MOST_BYTES)):
        if number not in (_PIECE, _TRAINER, _NORMALIZER):
            continue
        inside = dict(_fields(_bytes(value)))
        if number == _PIECE:
            score = _bytes(inside.get(_SCORE, bytes(4)))
            if len(score) != 4:
                raise UserError("a score is damaged")
            text = _bytes(inside.get(_TEXT, b"")).decode("utf-8")
            pieces.append((text, struct.unpack("<f", score)[0]))
            continue
        for name, (switch, usual) in (_TRAINED if number == _TRAINER else _NORMALIZED).items():
            if inside.get(switch, usual) != usual:
                raise UserError(f"its {name} is {inside[switch]!r:.20}, which is not T5's")
        if number == _NORMALIZER:
            charsmap = _bytes(inside.get(_CHARSMAP, b"")) or None
    return Vocabulary(pieces, charsmap)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in their order: number, and a whole number or bytes.

    Raises:
        UserError: the message is damaged.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise UserError("its fields are damaged or cut short")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number of seven bits a byte, the lowest first; and where the next field begins."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise UserError("its fields are damaged or cut short")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise UserError("its fields are damaged or of another message")
    return value

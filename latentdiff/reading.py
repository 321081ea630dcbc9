"""Bounded reads of files that nobody vouches for: regular ones only, and no more than was agreed.

A pipe would be waited for without end, and a device such as /dev/zero read without end, so neither
is opened. Text is UTF-8 with or without a byte order mark, or UTF-16 with one, as Windows programs
save it. Everything that goes wrong is an `OSError` or, in what a file holds, a
`UnicodeDecodeError`: the caller knows what the file is for, and says so.
"""

import errno
import hashlib
import io
import json
import os
import stat
from pathlib import Path
from typing import BinaryIO, TextIO

MOST_NESTED = 64
"""Levels of lists and objects within each other that a JSON text may have."""

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def open_regular(path: Path, most: int | None = None) -> BinaryIO:
    """A regular file, open for reading.

    Args:
        most: bytes that it may have.

    Raises:
        OSError: it is not there, is no regular file, or has more bytes.
    """
    try:
        found = path.stat()
    except ValueError as error:  # a name with a NUL, or with half a character
        raise OSError(errno.EINVAL, "no file can have this name") from error
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file, but a pipe or a device")
    if most is not None and found.st_size > most:
        raise OSError(errno.EFBIG, f"larger than {_size(most)}")
    return path.open("rb")


def fingerprint(path: Path) -> str:
    """The first 64 bits of sha256, in hex: of a file its bytes; of a folder the names and the bytes
    of its safetensors and JSON files.

    Raises:
        OSError: see `open_regular`.
    """
    files = [path]
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256()
    for file in files:
        if file != path:
            digest.update(f"{file.relative_to(path)}\n".encode())
        with open_regular(file) as opened:
            while part := opened.read(2**20):
                digest.update(part)
    return digest.hexdigest()[:16]


def read_bytes(path: Path, most: int) -> bytes:
    """All of a regular file of at most `most` bytes.

    Raises:
        OSError: see `open_regular`.
    """
    with open_regular(path, most) as file:
        return file.read(most)


def read_text(path: Path, most: int) -> str:
    """All of a text file of at most `most` bytes.

    Raises:
        OSError: see `open_regular`.
        UnicodeDecodeError: it is not UTF-8, and not UTF-16 with a byte order mark.
    """
    return decode(read_bytes(path, most))


def open_text(path: Path, most: int, newline: str | None = None) -> TextIO:
    """A text file of at most `most` bytes, open for reading line by line; `newline` as in `open`.

    Raises:
        OSError: see `open_regular`.
    """
    file = open_regular(path, most)
    encoding = "utf-16" if file.read(2) in _UTF_16 else "utf-8-sig"
    file.seek(0)
    return io.TextIOWrapper(file, encoding=encoding, newline=newline)


def decode(data: bytes) -> str:
    """The text in the bytes of a file, without its byte order mark.

    Raises:
        UnicodeDecodeError: it is not UTF-8, and not UTF-16 with a byte order mark.
    """
    return data.decode("utf-16" if data.startswith(_UTF_16) else "utf-8-sig")


def parse_json(text: str | bytes) -> object:
    """The value in a JSON text that is nested at most `MOST_NESTED` deep.

    Python's own parser goes down about a thousand levels, after which whatever looks into the value
    fails.

    Raises:
        ValueError: it is not JSON, is nested deeper, or has a number of thousands of digits.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_NESTED):
        parts = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for each in parts for part in each if isinstance(part, dict | list)]
        if not level:
            return value
    raise ValueError("it is nested too deep")


def reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words for a message."""
    told = error.strerror if isinstance(error, OSError) else None
    return " ".join(str(told or error).split())


def half_character(text: str) -> str | None:
    """The first half of a UTF-16 pair that stands alone, as U+D83D; None if there is none.

    JSON can spell it, but it is no character: neither a tokenizer nor a file takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"U+{ord(text[error.start]):04X}"
    return None


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 2**20 else f"{count:,} bytes"

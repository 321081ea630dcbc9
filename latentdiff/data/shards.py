"""Captioned pictures in tar files, as WebDataset lays them out.

The members of one sample share a key, their name up to its first dot: a picture, and `.json` (the
fields of `metadata.jsonl`), `.txt` or `.caption` (one caption a line). Headers alone are read to
list a shard; a picture is then read from its place in the file, so any order is as good as another
and a position is a number.
"""

import io
import math
import os
import re
import tarfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from latentdiff.data.examples import Example, Row, filter_rows, make_example
from latentdiff.data.listing import is_dropping, list_files
from latentdiff.errors import UserError
from latentdiff.picture_formats import NAMES, SUFFIXES
from latentdiff.reading import decode, open_regular, parse_json, reason

INDEX = "index.json"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 1_000_000
_MAX_TEXT = 2**20
_MAX_HEADER = 2**21  # bytes that a tar file's header may have tarfile read at once
_TEXTS = ("txt", "caption", "json")
_NOTES = frozenset(
    {
        *("readme", "license", "licence", "copying", "notice", "changelog", "citation"),
        *("index", "info", "metadata", "dataset_info", "dataset_infos", "stats"),
    }
)

Sample = dict[str, tarfile.TarInfo]
"""Extension -> member."""


def expand(pattern: Path) -> list[Path]:
    """The paths that a pattern stands for, in order; a plain path stands for itself.

    `shards/{00000..00099}.tar` counts, and `shards/*.tar` lists what is there.

    Raises:
        UserError: a range runs backwards or is immense, or nothing is there that matches.
    """
    text = str(pattern)
    ranges = [_range(pattern, *found) for found in _RANGE.findall(text)]
    if math.prod(map(len, ranges)) > _MAX_SHARDS:
        raise UserError(f"{pattern} stands for more than {_MAX_SHARDS:,} files: mend its range")
    if _is_glob(text):
        return _matching(pattern)
    return [Path(path) for path in _spelled(text)]


def _matching(pattern: Path) -> list[Path]:
    """The files of a folder whose names match, `*` and `?` standing for what they do in a shell."""
    name = pattern.name.replace("[", "[[]")
    try:
        there = sorted(pattern.parent.iterdir())
    except OSError as error:
        raise UserError(f"{pattern.parent} cannot be read: {reason(error)}") from None
    found = [p for p in there if fnmatchcase(p.name, name) and not is_dropping(p.name)]
    if not found:
        raise UserError(f"there is no file {pattern}")
    return found


def _range(pattern: Path, first: str, last: str) -> range:
    if max(len(first), len(last)) > len(str(_MAX_SHARDS)) + 9:
        raise UserError(f"{pattern!s:.80} counts too far")
    numbers = range(int(first), int(last) + 1)
    if not numbers:
        raise UserError(f"{pattern}: the range {{{first}..{last}}} is empty")
    return numbers


def _spelled(text: str) -> list[str]:
    """Every text that the ranges in one stand for."""
    found = _RANGE.search(text)
    if found is None:
        return [text]
    first, last = found.groups()
    head, tails = text[: found.start()], _spelled(text[found.end() :])
    numbers = range(int(first), int(last) + 1)
    return [f"{head}{n:0{len(first)}}{tail}" for n in numbers for tail in tails]


def _is_glob(text: str) -> bool:
    remote = text.startswith(("http:/", "https:/"))
    return not remote and ("*" in text or "?" in text) and not os.path.lexists(text)


def shards_of(root: Path) -> list[Path]:
    """The shards of a pattern, or in a folder.

    Raises:
        UserError: see `expand`; or there is none.
    """
    if not root.is_dir():
        return expand(root)
    shards = [path for path in list_files(root).files if path.suffix.lower() == ".tar"]
    if not shards:
        raise UserError(f"{root} holds no shards (.tar)")
    return shards


def list_shards(root: Path, *, where: Mapping[str, tuple[str, ...]] | None = None) -> list[Example]:
    """Every sample of the shards of a pattern or folder, in their order.

    Args:
        where: as in `read_folder`.

    Raises:
        UserError: a shard is missing, damaged or no tar file, or `where` keeps nothing.
    """
    rows = rows_of_shards(shards_of(root))
    if not rows:
        raise UserError(f"{root} holds no pictures ({NAMES})")
    return [make_example(root, row) for row in filter_rows(rows, where or {}, root)]


def rows_of_shards(shards: Iterable[Path]) -> list[Row]:
    """Every sample of some shards, in their order.

    Raises:
        UserError: a shard is missing, damaged or no tar file, or a sample has no picture.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [row for part in pool.map(_rows, shards) for row in part]


class _Headers(io.RawIOBase):
    """A file of which no header can have gigabytes read at once."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def _rows(shard: Path) -> list[Row]:
    try:
        with (
            open_regular(shard) as file,
            tarfile.open(fileobj=_Headers(file), mode="r:") as tar,
        ):
            samples = _samples(tar, os.fstat(file.fileno()).st_size)
            _check_no_folder(shard, samples)
            rows = [_row(shard, key, sample, file) for key, sample in samples]
    except RecursionError:
        raise UserError(f"the shard {shard} cannot be read: headers within headers") from None
    except (tarfile.TarError, EOFError, ValueError, OverflowError, OSError) as error:
        if isinstance(error, UserError):
            raise
        told = _compressed(shard) or reason(error)
        raise UserError(f"the shard {shard} cannot be read: {told}") from None
    return [row for row in rows if row is not None]


def _samples(tar: tarfile.TarFile, size: int) -> list[tuple[str, Sample]]:
    """Key and members of each sample.

    Members of a key belong together wherever they stand, as where `tar` packed a folder in the
    order of the disk; a key whose extension comes again begins another sample.
    """
    newest: dict[str, Sample] = {}
    samples: list[tuple[str, Sample]] = []
    last = 0
    for member in tar:
        if member.size < 0 or member.offset_data < last:  # tarfile itself may go round and round
            raise tarfile.ReadError(f"{member.name!r:.80} lies before the one before it")
        last = member.offset_data
        parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
        if not member.isreg() or member.issparse() or any(map(is_dropping, parts)):
            continue
        if last + member.size > size:
            raise tarfile.ReadError(f"{member.name!r:.80} is cut short")
        key, extension = _split(member.name)
        sample = newest.get(key)
        if sample is None or extension in sample:
            sample = newest[key] = {}
            samples.append((key, sample))
        sample[extension] = member
    return samples


def _check_no_folder(shard: Path, samples: list[tuple[str, Sample]]) -> None:
    """Pass a shard; refuse a packed picture folder, whose captions are in its metadata alone."""
    named = [kind for key, sample in samples for kind in sample if _is_metadata(key, kind)]
    if named and not any(kind in sample for _, sample in samples for kind in _TEXTS):
        raise UserError(f"{shard} is a picture folder with its metadata.{named[0]}: unpack it")


def _is_metadata(key: str, kind: str) -> bool:
    return key.rpartition("/")[2] == "metadata" and kind in ("jsonl", "csv", "parquet")


def _row(shard: Path, key: str, sample: Sample, file: BinaryIO) -> Row | None:
    """None for what is no sample: a README, a licence, an index."""
    pictures = [member for kind, member in sample.items() if f".{kind}" in SUFFIXES]
    texts = {kind: sample[kind] for kind in _TEXTS if kind in sample}
    if not pictures:
        if not texts or key.rpartition("/")[2].casefold() in _NOTES:
            return None
        there = ", ".join(sample)
        raise UserError(f"{shard}: the sample {key!r} has no picture ({NAMES}), but {there}")
    fields: dict[str, object] = {}
    faults: list[str] = []
    for kind, member in texts.items():
        if member.size > _MAX_TEXT and len(texts) > 1:
            continue
        if member.size > _MAX_TEXT:
            faults.append(f"{member.name} is larger than {_MAX_TEXT >> 20} MiB")
            continue
        file.seek(member.offset_data)
        try:
            text = decode(file.read(member.size))
            found = parse_json(text) if kind == "json" else {"captions": text.splitlines()}
        except ValueError as error:
            faults.append(f"{member.name} cannot be read: {reason(error)}")
            continue
        if isinstance(found, dict):
            fields = {**found, **fields} if kind == "caption" else {**fields, **found}
        else:
            faults.append(f"{member.name} is no JSON object")
    picture = pictures[0]
    fields["file_name"] = picture.name
    fault = faults[0] if faults else ""
    return Row(fields, shard, span=(picture.offset_data, picture.size), fault=fault)


def _split(name: str) -> tuple[str, str]:
    """Key and extension: a name up to the first dot of its last part, and what follows it."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _compressed(shard: Path) -> str:
    """Say what to do with a shard that is a compressed file."""
    try:
        with open_regular(shard) as file:
            start = file.read(6)
    except OSError:
        return ""
    kinds = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK": "zip"}
    kind = next((kind for magic, kind in kinds.items() if start.startswith(magic)), "")
    return f"it is compressed ({kind}): unpack it" if kind else ""

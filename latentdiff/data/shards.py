"""Captioned pictures in tar files, as WebDataset lays them out.

The members of one sample follow each other and share a key, their name up to its first dot: a
picture, and `.json` (the fields of `metadata.jsonl`) or `.txt` (one caption a line). Headers alone
are read to list a shard; a picture is then read from its place in the file, so any order is as
good as another and a position is a number.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import cast

from latentdiff.data.examples import SUFFIXES, Example, filter_rows, make_example, parse_json
from latentdiff.errors import UserError

INDEX = "index.json"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_TEXT = 2**20


def names_shards(root: Path) -> bool:
    """Tell whether `data.root` names tar shards (one file or a pattern) instead of a folder."""
    return root.suffix == ".tar"


def expand(pattern: Path) -> list[Path]:
    """`shards/{00000..00099}.tar` as its paths, in order; a plain path as itself.

    Raises:
        UserError: the range runs backwards.
    """
    found = _RANGE.search(str(pattern))
    if found is None:
        return [pattern]
    first, last = found.groups()
    if int(last) < int(first):
        raise UserError(f"{pattern}: the range {found.group()} is empty")
    head, tail = str(pattern)[: found.start()], str(pattern)[found.end() :]
    numbers = range(int(first), int(last) + 1)
    return [p for n in numbers for p in expand(Path(f"{head}{n:0{len(first)}}{tail}"))]


def list_shards(
    pattern: Path, *, where: Mapping[str, tuple[str, ...]] | None = None
) -> list[Example]:
    """Every sample of the shards, in their order.

    Args:
        where: as in `read_folder`.

    Raises:
        UserError: a shard is missing, damaged or no tar file, or `where` keeps nothing.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        lists = pool.map(lambda path: list(_rows(path)), expand(pattern))
        rows = [row for part in lists for row in part]
    if not rows:
        raise UserError(f"{pattern} holds no pictures (PNG, JPEG or WebP)")
    return [_example(pattern, row) for row in filter_rows(rows, where or {}, pattern)]


def _example(pattern: Path, row: dict[str, object]) -> Example:
    start, size = cast(tuple[int, int], row["span"])
    fields = {key: value for key, value in row.items() if key not in ("span", "shard")}
    example = make_example(pattern, fields)
    return replace(example, path=Path(str(row["shard"])), span=(start, size))


def _rows(shard: Path) -> Iterator[dict[str, object]]:
    """Fields of each sample; `file_name` is the member's, `shard` and `span` say where it lies."""
    try:
        with tarfile.open(shard, "r:") as tar:
            members = (member for member in tar if member.isreg() and not member.issparse())
            for key, group in groupby(members, lambda member: _split(member.name)[0]):
                yield _row(shard, key, tar, list(group))
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the shard {shard} cannot be read: {reason}") from None


def _row(
    shard: Path, key: str, tar: tarfile.TarFile, members: list[tarfile.TarInfo]
) -> dict[str, object]:
    row: dict[str, object] = {}
    picture = None
    for member in members:
        extension = _split(member.name)[1].lower()
        if f".{extension}" in SUFFIXES and picture is None:
            picture = member
        elif extension in {"json", "txt"} and member.size <= _MAX_TEXT:
            file = tar.extractfile(member)
            text = b"" if file is None else file.read()
            if extension == "txt":
                row.setdefault("captions", text.decode("utf-8-sig").splitlines())
                continue
            fields = parse_json(text)
            if not isinstance(fields, dict):
                raise UserError(f"{shard}: {member.name} is no JSON object")
            row = {**row, **fields}
    if picture is None:
        raise UserError(f"{shard}: the sample {key!r} has no picture (PNG, JPEG or WebP)")
    span = (picture.offset_data, picture.size)
    return {**row, "file_name": picture.name, "shard": str(shard), "span": span}


def _split(name: str) -> tuple[str, str]:
    """Key and extension: a name up to the first dot of its last part, and what follows it."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension

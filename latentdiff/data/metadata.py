"""Metadata files of picture folders: `metadata.jsonl`, `metadata.csv` or `metadata.parquet`.

A row has `file_name`, relative to the folder of the file, `text` or `caption`, optionally
`captions` (a list of further ones) and any other fields. A `metadata.parquet` may hold the pictures
themselves.
"""

import csv
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from latentdiff.data.examples import Row
from latentdiff.data.parquet import fields_of_parquet, rows_of_parquet
from latentdiff.errors import UserError
from latentdiff.reading import open_text, parse_json, reason

_MAX_BYTES = 2**30
_MAX_LINE = 2**24
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SHOWN = 3  # names quoted in a message before "..."

Fields = dict[str, object]


def is_metadata(path: Path) -> bool:
    """Tell whether a file of a picture folder is named as its metadata."""
    return path.name.casefold() in METADATA


def rows_of_metadata(path: Path, root: Path) -> list[Row]:
    """The rows of a metadata file; `file_name` in them is relative to `root`, as in `Row.path`.

    Raises:
        UserError: it cannot be read, is malformed, or names no or the same pictures.
    """
    if path.suffix.casefold() == ".parquet" and (held := rows_of_parquet(path, root)) is not None:
        return held
    try:
        rows = _READERS[path.name.casefold()](path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    _check_file_names(rows, path)
    folder = path.parent.relative_to(root)
    found: list[Row] = []
    for fields in rows:
        name = fields.get("file_name")
        if isinstance(name, str) and name and "\0" not in name:
            name = _with_slashes(name, path.parent)
            fields["file_name"] = name if folder == Path() else (folder / name).as_posix()
            found.append(Row(fields, path.parent / name))
        else:
            found.append(Row(fields, path))
    refuse(_listed_twice(found), "are listed more than once", root)
    return found


def refuse(names: Sequence[str], complaint: str, root: Path) -> None:
    """Pass if there are no names.

    Raises:
        UserError: it counts them and quotes the first.
    """
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise UserError(f"{len(names)} pictures of {root} {complaint}: {shown}")


def _check_file_names(rows: Sequence[Fields], path: Path) -> None:
    """Pass metadata of which a row names a picture; a table with other columns is told apart."""
    if not rows or any("file_name" in row for row in rows):
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    there = ", ".join(columns[:9]) + (", ..." if len(columns) > 9 else "")
    sign = next((sign for sign in ";\t|" if len(columns) == 1 and sign in columns[0]), None)
    hint = f"; separate the columns by commas, not by {sign!r}" if sign else ""
    raise UserError(f"{path} has no file_name, the column that names a picture, but {there}{hint}")


def _with_slashes(name: str, folder: Path) -> str:
    """A path as Windows writes it, `sub\\a.png`, as this system reads it."""
    if "\\" not in name or os.sep == "\\" or os.path.lexists(folder / name):
        return name
    return PurePosixPath(name.replace("\\", "/")).as_posix()


def _rows_from_jsonl(path: Path) -> list[Fields]:
    rows: list[Fields] = []
    with open_text(path, _MAX_BYTES) as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), ""), start=1):
            if len(line) == _MAX_LINE:
                raise UserError(f"{path}, line {number}: longer than {_MAX_LINE >> 20} MiB")
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
            rows.append(row)
    return rows


def _rows_from_csv(path: Path) -> list[Fields]:
    """`captions`, where there is such a column, holds a JSON list."""
    rows: list[Fields] = []
    with open_text(path, _MAX_BYTES, newline="") as file:
        for row in csv.DictReader(file, restkey="", strict=True):
            fields: Fields = dict(row)
            if "" in fields:
                raise UserError(f"{path}: a row has more cells than the header")
            if fields.get("captions"):
                try:
                    fields["captions"] = parse_json(str(fields["captions"]))
                except ValueError as error:
                    raise UserError(f"{path}: `captions` must be a JSON list ({error})") from error
            rows.append(fields)
    return rows


_READERS: dict[str, Callable[[Path], list[Fields]]] = dict(
    zip(METADATA, (_rows_from_jsonl, _rows_from_csv, fields_of_parquet), strict=True)
)


def _listed_twice(rows: Sequence[Row]) -> list[str]:
    names = (row.fields.get("file_name") for row in rows)
    counts = Counter(name for name in names if isinstance(name, str) and name)
    return [name for name, count in counts.items() if count > 1]

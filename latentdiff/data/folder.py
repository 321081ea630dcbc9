"""A folder of pictures with captions, in the layout of Hugging Face `imagefolder`.

Either one `metadata.jsonl`, `metadata.csv` or `metadata.parquet` at the top, with `file_name`
(relative to the folder) and `text`, and optionally `captions` (a list of further ones) and any
other fields; or no metadata and beside each picture a `.txt` of the same name, one caption a line.
"""

import csv
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from latentdiff.data.examples import SUFFIXES, Example, filter_rows, make_example, parse_json
from latentdiff.data.shards import list_shards, names_shards
from latentdiff.errors import UserError

_SHOWN = 3  # names quoted in a message before "..."

Content = TypeVar("Content")


def read_folder(
    root: str | Path, *, where: Mapping[str, tuple[str, ...]] | None = None
) -> list[Example]:
    """Lists a caption-picture folder in the order of its metadata (of its names, without metadata).

    `root` may also name shards: `shards/{00000..00099}.tar`.

    Args:
        where: for each field named, the values to keep, compared as text; a missing value is "".
            `{"style": ("noto",), "split": ("train",)}`.

    Raises:
        UserError: as `list_folder`, or a picture is missing or has no caption.
    """
    examples = list_folder(root, where=where)
    _refuse_where(examples, lambda example: not example.path.is_file(), "are missing", root)
    _refuse_where(examples, lambda example: not example.captions, "have no caption", root)
    return examples


def list_folder(
    root: str | Path, *, where: Mapping[str, tuple[str, ...]] | None = None
) -> list[Example]:
    """The same without a look at the single pictures: some may be missing or lack a caption.

    Raises:
        UserError: no folder, no pictures, repeated files, files outside the folder, malformed or
            unreadable metadata or captions, or a `where` that keeps nothing.
    """
    root = Path(root)
    if names_shards(root):
        return list_shards(root, where=where)
    if not root.is_dir():
        raise UserError(f"there is no picture folder {root}")
    files = [root / name for name in _READERS if os.path.lexists(root / name)]
    if len(files) > 1:
        raise UserError(f"{root} has both {files[0].name} and {files[1].name}: keep one")
    inside = os.path.realpath(root)
    if files and not _is_inside(files[0], inside):
        raise UserError(f"{files[0]} lies outside the folder: put a copy into it")
    rows = _read(_READERS[files[0].name], files[0]) if files else _rows_from_texts(root, inside)
    if not rows:
        raise UserError(f"{root} holds no pictures (PNG, JPEG or WebP)")
    _refuse(_duplicates(rows), "are listed more than once", root)
    rows = filter_rows(rows, where or {}, root)
    examples = [make_example(root, row) for row in rows]
    _refuse_where(
        examples,
        lambda example: not _is_inside(example.path, inside),
        "lie outside the folder",
        root,
    )
    return examples


def check_fields(examples: Sequence[Example], names: Sequence[str], root: Path) -> None:
    """Pass if every picture's metadata has these fields, be they empty.

    Raises:
        UserError: some lack one.
    """
    for name in names:
        _refuse_where(
            examples, lambda e, name=name: name not in e.fields, f"lack the field {name!r}", root
        )


def _read(reader: Callable[[Path], Content], path: Path) -> Content:
    """Read a file of the folder with `reader`; a dangling link is an error, not a missing file."""
    try:
        return reader(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        told = str(error.strerror or error) if isinstance(error, OSError) else str(error)
        raise UserError(f"{path} cannot be read: {' '.join(told.split())}") from error


def _rows_from_jsonl(path: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
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


def _rows_from_csv(path: Path) -> list[dict[str, object]]:
    """`captions`, where there is such a column, holds a JSON list."""
    rows: list[dict[str, object]] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, restkey="", strict=True):
            fields: dict[str, object] = dict(row)
            if "" in fields:
                raise UserError(f"{path}: a row has more cells than the header")
            if fields.get("captions"):
                try:
                    fields["captions"] = parse_json(str(fields["captions"]))
                except ValueError as error:
                    raise UserError(f"{path}: `captions` must be a JSON list ({error})") from error
            rows.append(fields)
    return rows


def _rows_from_parquet(path: Path) -> list[dict[str, object]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ModuleNotFoundError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        with path.open("rb") as file:  # of a directory pyarrow would read what lies in it
            return read_table(file).to_pylist()
    except ArrowException as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())})") from error


def _rows_from_texts(root: Path, inside: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for picture in sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES):
        caption = picture.with_suffix(".txt")
        there = os.path.lexists(caption)
        if there and not _is_inside(caption, inside):
            raise UserError(f"{caption} lies outside the folder: put a copy into it")
        lines = _read(_lines, caption) if there else []
        rows.append({"file_name": picture.relative_to(root).as_posix(), "captions": lines})
    return rows


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8-sig").splitlines()


_READERS: dict[str, Callable[[Path], list[dict[str, object]]]] = {
    "metadata.jsonl": _rows_from_jsonl,
    "metadata.csv": _rows_from_csv,
    "metadata.parquet": _rows_from_parquet,
}


def _duplicates(rows: Sequence[Mapping[str, object]]) -> list[str]:
    counts = Counter(str(row.get("file_name")) for row in rows)
    return [name for name, count in counts.items() if count > 1]


def _is_inside(path: Path, folder: str) -> bool:
    """Tell, with links followed, if a path is inside: a folder must not reach other files."""
    return os.path.commonpath((folder, os.path.realpath(path))) == folder


def _refuse(names: Sequence[str], complaint: str, root: Path) -> None:
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise UserError(f"{len(names)} pictures of {root} {complaint}: {shown}")


def _refuse_where(
    examples: Sequence[Example],
    applies: Callable[[Example], bool],
    complaint: str,
    root: str | Path,
) -> None:
    names = [str(example.fields["file_name"]) for example in examples if applies(example)]
    _refuse(names, complaint, Path(root))

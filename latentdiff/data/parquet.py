"""Captioned pictures in parquet files, as the Hugging Face Hub keeps and `datasets` writes them.

A column `image` of {bytes, path}, or of bytes, holds the pictures' files; `text` and any other
columns are the fields of `metadata.jsonl`. Listing reads everything but the pictures; those are
read a row group at a time when their turn comes.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.data.examples import Row
from latentdiff.data.listing import is_inside
from latentdiff.data.row_groups import MAX_PICTURES, Cell, batches, leaf, open_parquet
from latentdiff.errors import UserError

if TYPE_CHECKING:
    from pyarrow import Array, DataType, RecordBatch, Schema
    from pyarrow.parquet import ParquetFile

_MAX_BYTES = 2**30  # of a file's fields: all are held in memory
_MAX_AT_ONCE = 2**28  # of those in a row group


def rows_of_parquet(path: Path, root: Path) -> list[Row] | None:
    """The rows of a parquet file that holds pictures; None if it holds none.

    Args:
        root: the folder that its pictures must lie in, where it names files instead.

    Raises:
        UserError: the file cannot be read, is too large, or names pictures outside of `root`.
    """
    with open_parquet(path) as parquet:
        column = _picture_column(parquet.schema_arrow)
        if column is None:
            return None
        top, dot, _ = column.partition(".")
        others = [f.name for f in parquet.schema_arrow if f.name != top and not _is_heavy(f.type)]
        named = [f"{top}.path"] if dot else []
        held = [_held(parquet, group, column) for group in range(parquet.num_row_groups)]
        rows: list[Row] = []
        for group, number, fields in _fields(parquet, [*others, *named]):
            inside = fields.pop(top, None)
            name = inside.get("path") if isinstance(inside, dict) else None
            fields["file_name"] = name or f"row {len(rows)}"
            if name and not held[group][number]:
                rows.append(Row(fields, _beside(path, name, root)))
            else:
                rows.append(Row(fields, path, cell=Cell(column, group, number)))
        return rows


def fields_of_parquet(path: Path) -> list[dict[str, object]]:
    """Every row of a parquet file as a dictionary.

    Raises:
        UserError: the file cannot be read, or is too large.
    """
    with open_parquet(path) as parquet:
        return [fields for _, _, fields in _fields(parquet, parquet.schema_arrow.names)]


def columns_of_parquet(path: Path) -> list[str]:
    """The names of a parquet file's columns.

    Raises:
        UserError: the file cannot be read.
    """
    with open_parquet(path) as parquet:
        return parquet.schema_arrow.names


def _picture_column(schema: "Schema") -> str | None:
    """The leaf that holds pictures: of `image` if there is one, else of the only such column."""
    from pyarrow import types

    leaves: dict[str, str] = {}
    for field in schema:
        if types.is_struct(field.type):
            inside = [field.type.field(number) for number in range(field.type.num_fields)]
            if any(part.name == "bytes" and _may_be_binary(part.type) for part in inside):
                leaves[field.name] = f"{field.name}.bytes"
        elif field.name == "image" and _is_binary(field.type):
            leaves[field.name] = field.name
    if "image" in leaves:
        return leaves["image"]
    return next(iter(leaves.values())) if len(leaves) == 1 else None


def _may_be_binary(kind: "DataType") -> bool:
    """Tell whether a column may hold bytes; where files name their pictures it may have no type."""
    from pyarrow import types

    return _is_binary(kind) or types.is_null(kind)


def _is_binary(kind: "DataType") -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_heavy(kind: "DataType") -> bool:
    """Tell whether a column holds files of another kind: masks, sounds, further pictures."""
    from pyarrow import types

    if types.is_struct(kind):
        return any(_is_heavy(kind.field(number).type) for number in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_heavy(kind.value_type)  # pyright: ignore[reportAttributeAccessIssue]
    return _is_binary(kind)


def _held(parquet: "ParquetFile", group: int, column: str) -> Sequence[bool]:
    """Tell whether each row of a group holds its picture; the footer mostly knows."""
    described = parquet.metadata.row_group(group)
    chunks = [described.column(number) for number in range(described.num_columns)]
    (chunk,) = [chunk for chunk in chunks if chunk.path_in_schema == column]
    known = chunk.statistics if chunk.is_stats_set else None
    if known is not None and known.has_null_count and known.null_count in (0, described.num_rows):
        return [known.null_count == 0] * described.num_rows
    parts = batches(parquet, group, [column], MAX_PICTURES)
    return [
        there for part in parts for there in leaf(part.column(0), column).is_valid().to_pylist()
    ]


def _fields(
    parquet: "ParquetFile", columns: Sequence[str]
) -> Iterator[tuple[int, int, dict[str, object]]]:
    """Group, number in the group, and fields of each row."""
    taken = 0
    for group in range(parquet.num_row_groups):
        number = 0
        for batch in batches(parquet, group, columns, _MAX_AT_ONCE):
            taken += batch.nbytes
            if taken > _MAX_BYTES:
                raise ValueError(f"more than {_MAX_BYTES >> 20} MiB beside the pictures")
            for fields in _plain(batch):
                yield group, number, fields
                number += 1


def _plain(batch: "RecordBatch") -> list[dict[str, object]]:
    columns = [_values(column) for column in batch.columns]
    names = batch.schema.names
    if not columns:
        return [{} for _ in range(batch.num_rows)]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(column: "Array") -> list[object]:
    """As Python's own types; as text where these cannot say it: dates before the year 1 and beyond
    9999, nanoseconds. What is no Unicode becomes half characters, for which captions are refused.
    """
    from pyarrow import binary, string

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [
            None if value is None else value.decode("utf-8", "surrogateescape")
            for value in column.cast(binary()).to_pylist()
        ]
    except (OverflowError, ValueError):
        return column.cast(string()).to_pylist()


def _beside(path: Path, name: str, root: Path) -> Path:
    """The picture that a parquet file names instead of holding it."""
    picture = path.parent / name
    if not is_inside(picture, os.path.realpath(root)):
        raise UserError(
            f"{path} names its pictures ({name}) instead of holding them, and they lie outside of "
            f"{root}: train on their folder, or write the file with the pictures in it"
        )
    return picture

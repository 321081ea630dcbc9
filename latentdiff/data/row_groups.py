"""Parquet files a row group at a time: nothing is held that was not asked for, and little at once.

A file of kilobytes can unfold to gigabytes, so rows and bytes are looked up in its footer first,
and counted as they come: a column that repeats one value unfolds to more than its footer says.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import UserError
from latentdiff.reading import open_regular, reason

if TYPE_CHECKING:
    from pyarrow import Array, ChunkedArray, DataType, RecordBatch
    from pyarrow.parquet import ParquetFile

MAX_ROWS = 5_000_000  # of a file: each becomes a Python dictionary
MAX_PICTURES = 2**30  # bytes of a row group's pictures
_KEPT = 2**28  # bytes of pictures that a process keeps beside the newest row group


@dataclass(frozen=True, slots=True)
class Cell:
    """A picture's place in a parquet file.

    Attributes:
        column: its leaf, as `image.bytes`.
        group: the row group, counted from 0.
        row: the row in it, counted from 0.
    """

    column: str
    group: int
    row: int


@contextmanager
def open_parquet(path: Path) -> Iterator["ParquetFile"]:
    """A parquet file of a sane number of rows; what goes wrong inside is one line.

    Raises:
        UserError: pyarrow is not installed, or the file cannot be read.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        with open_regular(path) as file, ParquetFile(file) as parquet:
            if parquet.metadata.num_rows > MAX_ROWS:
                rows = f"{parquet.metadata.num_rows:,} rows"
                raise UserError(f"{path} has {rows}; at most {MAX_ROWS:,} are read")
            yield parquet
    except UserError:
        raise
    except (ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error


def batches(
    parquet: "ParquetFile", group: int, columns: Sequence[str], most: int
) -> Iterator["RecordBatch"]:
    """The rows of a row group, of some columns, in batches that fit into memory.

    Args:
        columns: leaves, as `image.bytes`, or whole columns.
        most: bytes that they may unfold to.

    Raises:
        ValueError: the group has more.
    """
    held = parquet.metadata.row_group(group)
    chunks = [held.column(number) for number in range(held.num_columns)]
    wanted = tuple(f"{column}." for column in columns)
    sizes = [
        chunk.total_uncompressed_size
        for chunk in chunks
        if f"{chunk.path_in_schema}.".startswith(wanted)
    ]
    taken, together = sum(sizes), max(1, min(1000, most // max([1, *sizes])))
    if taken <= most:
        taken = 0
        for packed in parquet.iter_batches(together, [group], list(columns), use_threads=False):
            batch = _unfolded(packed)
            taken += batch.nbytes
            if taken > most:
                break
            yield batch
    if taken > most:
        raise ValueError(
            f"row group {group} has more than {most >> 20} MiB; write the file again with fewer "
            "rows in a group (row_group_size=100)"
        )


def _unfolded(batch: "RecordBatch") -> "RecordBatch":
    """A batch in which no value stands for many: what is seen is what it takes."""
    import pyarrow

    plain = [field.with_type(_plain_type(field.type)) for field in batch.schema]
    return batch.cast(pyarrow.schema(plain))


def _plain_type(kind: "DataType") -> "DataType":
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(kind):
        return kind.value_type  # pyright: ignore[reportAttributeAccessIssue]
    if types.is_list(kind):
        return pyarrow.list_(_plain_type(kind.value_type))  # pyright: ignore[reportAttributeAccessIssue]
    if types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        return pyarrow.struct([field.with_type(_plain_type(field.type)) for field in fields])
    return kind


def leaf(array: "Array", column: str) -> "Array":
    """The values of `image.bytes` in a batch's column `image`; those of a plain column itself."""
    _, dot, inside = column.partition(".")
    return array.field(inside) if dot else array  # pyright: ignore[reportAttributeAccessIssue]


def read_cell(path: Path, cell: Cell) -> bytes:
    """The bytes of a picture in a parquet file.

    Its row group is read and kept until others have taken its place, so pictures are best asked
    for in their order.

    Raises:
        UserError: the file cannot be read, or the cell holds no picture.
    """
    pictures = _NEWEST.of(path, cell)
    value = pictures[cell.row].as_py() if cell.row < len(pictures) else None
    if not isinstance(value, bytes):
        raise UserError(f"{path}: row {cell.row} of group {cell.group} holds no picture")
    return value


class _Newest:
    """The row groups that were read last; threads wait for each other, so none is read twice."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.groups: OrderedDict[tuple[Path, str, int], ChunkedArray] = OrderedDict()

    def of(self, path: Path, cell: Cell) -> "ChunkedArray":
        """All pictures of a cell's row group."""
        key = path, cell.column, cell.group
        with self.lock:
            if key not in self.groups:
                self.groups[key] = _read_group(path, cell)
            self.groups.move_to_end(key)
            while len(self.groups) > 1 and sum(g.nbytes for g in self.groups.values()) > _KEPT:
                self.groups.popitem(last=False)
            return self.groups[key]


_NEWEST = _Newest()


def _read_group(path: Path, cell: Cell) -> "ChunkedArray":
    with open_parquet(path) as parquet:
        from pyarrow import chunked_array

        parts = batches(parquet, cell.group, [cell.column], MAX_PICTURES)
        return chunked_array([leaf(batch.column(0), cell.column) for batch in parts])

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
    from pyarrow import Array, RecordBatch
    from pyarrow.parquet import ParquetFile

MAX_ROWS = 5_000_000  # of a file: each becomes a Python dictionary
_MAX_BYTES = 2**30  # of a row group's columns that are read together
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


def batches(parquet: "ParquetFile", group: int, columns: Sequence[str]) -> Iterator["RecordBatch"]:
    """The rows of a row group, of some columns, in batches that fit into memory.

    Args:
        columns: leaves, as `image.bytes`, or whole columns.

    Raises:
        ValueError: the group is too large, or unfolds to too much.
    """
    held = parquet.metadata.row_group(group)
    chunks = [held.column(number) for number in range(held.num_columns)]
    wanted = tuple(f"{column}." for column in columns)
    sizes = [
        chunk.total_uncompressed_size
        for chunk in chunks
        if f"{chunk.path_in_schema}.".startswith(wanted)
    ]
    if sum(sizes) > _MAX_BYTES:
        raise ValueError(_too_large(group))
    taken, together = 0, max(1, min(1000, _MAX_BYTES // max([1, *sizes])))
    for batch in parquet.iter_batches(together, [group], list(columns), use_threads=False):
        taken += batch.nbytes
        if taken > _MAX_BYTES:
            raise ValueError(_too_large(group))
        yield batch


def _too_large(group: int) -> str:
    return (
        f"row group {group} has more than {_MAX_BYTES >> 20} MiB; write it again with fewer rows "
        "in a group (row_group_size=100)"
    )


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
        self.groups: OrderedDict[tuple[Path, str, int], Array] = OrderedDict()

    def of(self, path: Path, cell: Cell) -> "Array":
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


def _read_group(path: Path, cell: Cell) -> "Array":
    with open_parquet(path) as parquet:
        from pyarrow import concat_arrays

        parts = batches(parquet, cell.group, [cell.column])
        return concat_arrays([leaf(batch.column(0), cell.column) for batch in parts])

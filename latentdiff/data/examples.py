"""A captioned picture: made of a row of metadata, read, decoded, and weighted among others."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff.data.row_groups import Cell, read_cell
from latentdiff.errors import UserError
from latentdiff.pictures import MAX_BYTES, Undecoded, centre_square, look_at, to_uint8
from latentdiff.reading import half_character, open_regular, reason

_SHOWN = 9  # values quoted in a message
_LARGE = 12_000_000  # pixels of a picture that is decoded alone

Seen = TypeVar("Seen")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of metadata, before its words are looked at.

    Attributes:
        fields: everything it says, `file_name` among it.
        path: the picture's file; or a shard or parquet file that holds it.
        span: in a shard, the place of the picture's first byte and how many there are.
        cell: in a parquet file, the picture's place.
        fault: why its words cannot be used, if they cannot.
    """

    fields: dict[str, object]
    path: Path
    span: tuple[int, int] | None = None
    cell: Cell | None = None
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One picture, its captions (`text` first) and every field of its metadata.

    Attributes:
        path: see `Row`, as for all that follows.
    """

    path: Path
    captions: tuple[str, ...]
    fields: Mapping[str, object]
    span: tuple[int, int] | None = None
    cell: Cell | None = None
    fault: str = ""

    @property
    def name(self) -> str:
        """For messages: the file, or what holds the picture and its name there."""
        held = self.span is not None or self.cell is not None
        return f"{self.path}, {self.fields['file_name']}" if held else str(self.path)

    def read(self) -> bytes:
        """The bytes of the picture's file, at most one more than `MAX_BYTES`.

        Raises:
            UserError: the file cannot be read.
        """
        if self.cell is not None:
            return read_cell(self.path, self.cell)[: MAX_BYTES + 1]
        start, size = self.span or (0, MAX_BYTES + 1)
        try:
            with open_regular(self.path) as file:
                file.seek(start)
                return file.read(min(size, MAX_BYTES + 1))
        except OSError as error:
            raise UserError(f"cannot open picture {self.name}: {reason(error)}") from error

    def open(self) -> Image.Image:
        """The picture as 8-bit RGB, see `open_picture`.

        Raises:
            UserError: the picture cannot be read or decoded.
        """
        return self.look_at().decode()

    def look_at(self) -> Undecoded:
        """The picture, not decoded as yet, see `latentdiff.pictures.look_at`.

        Raises:
            UserError: it cannot be read.
        """
        if self.span is None and self.cell is None:
            return look_at(self.path)
        return look_at(self.read(), name=self.name)


def make_example(root: Path, row: Row) -> Example:
    """The example of a row; a row whose words cannot be used has a `fault` and no captions.

    Raises:
        UserError: it names no picture.
    """
    name = row.fields.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(f"{root}: a row of the metadata has no file_name: {row.fields}"[:200])
    captions, fault = _captions(row.fields, name)
    return Example(row.path, captions, row.fields, row.span, row.cell, row.fault or fault)


def _captions(fields: Mapping[str, object], name: str) -> tuple[tuple[str, ...], str]:
    """Its captions, and why they cannot be used."""
    text, more, other = (fields.get(key) for key in ("text", "captions", "caption"))
    if not (text is None or isinstance(text, str)):
        return (), f"the text of {name} is not a string"
    if not (more is None or more == "" or _is_strings(more)):
        return (), f"the captions of {name} are not a list of strings"
    given = [text or "", *cast(list[str], more or [])]
    if not any(given) and (isinstance(other, str) or _is_strings(other)):
        given = [other] if isinstance(other, str) else cast(list[str], other)
    captions = tuple(dict.fromkeys(caption.strip() for caption in given if caption.strip()))
    for caption in captions:
        if half := half_character(caption):
            return (), f"a caption of {name} has half a character ({half}): {caption:.60}"
    return captions, ""


def filter_rows(
    rows: list[Row], where: Mapping[str, tuple[str, ...]], root: str | Path
) -> list[Row]:
    """The rows whose fields have the values that `where` names, compared as text.

    Raises:
        UserError: no row has such a field, or none has such a value.
    """
    for key, allowed in where.items():
        present = Counter(_as_text(row.fields.get(key)) for row in rows)
        if not any(key in row.fields for row in rows):
            raise UserError(f"no picture of {root} has the field {key!r}")
        rows = [row for row in rows if _as_text(row.fields.get(key)) in allowed]
        if not rows:
            values = ", ".join(repr(value) for value, _ in present.most_common(_SHOWN))
            raise UserError(f"no picture of {root} has {key} in {allowed}; there are {values}")
    return rows


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def load_picture(example: Example, size: int) -> Tensor:
    """The picture's middle square at `size` pixels a side: uint8 tensor [3, size, size]."""
    return to_uint8(centre_square(example.open(), size))


def load_pictures(examples: Sequence[Example], size: int, *, progress: bool = True) -> Tensor:
    """All pictures, decoded by several threads: uint8 tensor [N, 3, size, size].

    Raises:
        UserError: some cannot be read; the message says how many, and why the first.
    """
    pictures = torch.empty((len(examples), 3, size, size), dtype=torch.uint8)

    def load(index: int, image: Image.Image) -> None:
        pictures[index] = to_uint8(centre_square(image, size))

    seen = see_all(examples, load, "pictures", progress=progress)
    errors = [error for error in seen if isinstance(error, UserError)]
    if errors:
        count = f"{len(errors)} of {len(examples)}"
        raise UserError(f"{count} pictures cannot be used; the first: {errors[0]}")
    return pictures


def see_all(
    examples: Sequence[Example],
    see: Callable[[int, Image.Image], Seen],
    what: str,
    *,
    progress: bool = True,
) -> list[Seen | UserError]:
    """Apply `see` to each decoded picture and its number; yields results or why one is not decoded.

    Several threads decode; large pictures are left to a single one, so that few are in memory at a
    time, and the memory that one leaves serves the next.
    """

    def decode(index: int, picture: Undecoded) -> Seen:
        return see(index, picture.decode())

    def one(index: int) -> Seen | UserError:
        try:
            picture = examples[index].look_at()
            if picture.pixels > _LARGE:
                return large.submit(decode, index, picture).result()
            return decode(index, picture)
        except UserError as error:
            return error

    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as large:
        done = pool.map(one, range(len(examples)))
        return list(tqdm(done, total=len(examples), desc=what, disable=not progress, leave=False))


def balanced_weights(
    examples: Sequence[Example], keys: Sequence[str] = ("style", "base")
) -> np.ndarray:
    """Sampling probabilities, float64 [N], that give each group of equal `keys` the same total.

    A picture that lacks one of the fields is a group of its own: without them all are alike.
    """
    groups = [
        tuple(str(example.fields[key]) for key in keys)
        if all(key in example.fields for key in keys)
        else (index,)
        for index, example in enumerate(examples)
    ]
    sizes = Counter(groups)
    return np.array([1.0 / (sizes[group] * len(sizes)) for group in groups], dtype=np.float64)

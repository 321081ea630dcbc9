"""A captioned picture: made of a row of metadata, read, decoded, and weighted among others."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff.errors import UserError
from latentdiff.pictures import MAX_BYTES, centre_square, open_picture, to_uint8

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
_SHOWN = 9  # values quoted in a message


@dataclass(frozen=True, slots=True)
class Example:
    """One picture, its captions (at least one, `text` first) and every field of its metadata.

    Attributes:
        path: the picture's file; or a shard that holds it.
        span: in a shard, the place of the picture's first byte and how many there are.
    """

    path: Path
    captions: tuple[str, ...]
    fields: Mapping[str, object]
    span: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """Name for messages: the file, or the shard and the member."""
        return str(self.path if self.span is None else f"{self.path}, {self.fields['file_name']}")

    def read(self) -> bytes:
        """The bytes of the picture's file, at most one more than `MAX_BYTES`.

        Raises:
            UserError: the file cannot be read.
        """
        start, size = self.span or (0, MAX_BYTES + 1)
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(min(size, MAX_BYTES + 1))
        except OSError as error:
            raise UserError(
                f"cannot open picture {self.name}: {error.strerror or error}"
            ) from error

    def open(self) -> Image.Image:
        """The picture as 8-bit RGB, see `open_picture`.

        Raises:
            UserError: the picture cannot be read or decoded.
        """
        if self.span is None:
            return open_picture(self.path)
        try:
            return open_picture(self.read())
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error


def make_example(root: Path, row: dict[str, object]) -> Example:
    name, text, more = row.get("file_name"), row.get("text"), row.get("captions")
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(f"{root}: a row of the metadata has no file_name: {row}"[:200])
    if not (text is None or isinstance(text, str)):
        raise UserError(f"{root}: the text of {name} is not a string")
    if not (more is None or more == "" or _is_strings(more)):
        raise UserError(f"{root}: the captions of {name} are not a list of strings")
    given = [text or "", *cast(list[str], more or [])]
    captions = dict.fromkeys(caption.strip() for caption in given if caption.strip())
    return Example(root / name, tuple(captions), row)


def filter_rows(
    rows: list[dict[str, object]], where: Mapping[str, tuple[str, ...]], root: Path
) -> list[dict[str, object]]:
    for key, allowed in where.items():
        present = Counter(_as_text(row.get(key)) for row in rows)
        if not any(key in row for row in rows):
            raise UserError(f"no picture of {root} has the field {key!r}")
        rows = [row for row in rows if _as_text(row.get(key)) in allowed]
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


def parse_json(text: str | bytes) -> object:
    """Parse untrusted JSON.

    Raises:
        ValueError: the text is no JSON, is nested too deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def load_picture(example: Example, size: int) -> Tensor:
    """The picture's middle square at `size` pixels a side: uint8 tensor [3, size, size]."""
    return to_uint8(centre_square(example.open(), size))


def load_pictures(examples: Sequence[Example], size: int, *, progress: bool = True) -> Tensor:
    """All pictures, decoded by several threads: uint8 tensor [N, 3, size, size].

    Raises:
        UserError: some cannot be read; the message says how many, and why the first.
    """
    pictures = torch.empty((len(examples), 3, size, size), dtype=torch.uint8)

    def load(index: int) -> UserError | None:
        try:
            pictures[index] = load_picture(examples[index], size)
        except UserError as error:
            return error
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done = pool.map(load, range(len(examples)))
        bar = tqdm(done, total=len(examples), desc="pictures", disable=not progress)
        errors = [error for error in bar if error is not None]
    if errors:
        count = f"{len(errors)} of {len(examples)}"
        raise UserError(f"{count} pictures cannot be used; the first: {errors[0]}")
    return pictures


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

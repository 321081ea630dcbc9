"""A folder of pictures with captions, in the layout of Hugging Face `imagefolder`.

Either one `metadata.jsonl`, `metadata.csv` or `metadata.parquet` at the top, with `file_name`
(relative to the folder) and `text`, and optionally `captions` (a list of further ones) and any
other fields; or no metadata and beside each picture a `.txt` of the same name, one caption a line.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
_SHOWN = 3  # names quoted in a message before "..."


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
        """For messages: the file, or the shard and the member."""
        return str(self.path if self.span is None else f"{self.path}, {self.fields['file_name']}")

    def read(self) -> bytes:
        """The bytes of the picture's file, at most one more than `MAX_BYTES`.

        Raises:
            UserError: they cannot be read.
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
            UserError: it cannot be read or decoded.
        """
        if self.span is None:
            return open_picture(self.path)
        try:
            return open_picture(self.read())
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error


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
        UserError: no folder, no pictures, repeated files, files outside the folder, malformed
            metadata, or a `where` that keeps nothing.
    """
    from latentdiff.data.shards import list_shards, names_shards  # which reads what is here

    root = Path(root)
    if names_shards(root):
        return list_shards(root, where=where)
    if not root.is_dir():
        raise UserError(f"there is no picture folder {root}")
    files = [root / name for name in _READERS if (root / name).is_file()]
    if len(files) > 1:
        raise UserError(f"{root} has both {files[0].name} and {files[1].name}: keep one")
    inside = os.path.realpath(root)
    if files and not _is_inside(files[0], inside):
        raise UserError(f"{files[0]} lies outside the folder: put a copy into it")
    try:
        rows = _READERS[files[0].name](files[0]) if files else _rows_from_texts(root, inside)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{files[0] if files else root} cannot be read: {error}") from error
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


def parse_json(text: str | bytes) -> object:
    """JSON that nobody vouches for.

    Raises:
        ValueError: it is none, nested too deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


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
        return read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())})") from error


def _rows_from_texts(root: Path, inside: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for picture in sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES):
        caption = picture.with_suffix(".txt")
        if caption.is_file() and not _is_inside(caption, inside):
            raise UserError(f"{caption} lies outside the folder: put a copy into it")
        lines = caption.read_text("utf-8-sig").splitlines() if caption.is_file() else []
        rows.append({"file_name": picture.relative_to(root).as_posix(), "captions": lines})
    return rows


_READERS: dict[str, Callable[[Path], list[dict[str, object]]]] = {
    "metadata.jsonl": _rows_from_jsonl,
    "metadata.csv": _rows_from_csv,
    "metadata.parquet": _rows_from_parquet,
}


def _duplicates(rows: Sequence[Mapping[str, object]]) -> list[str]:
    counts = Counter(str(row.get("file_name")) for row in rows)
    return [name for name, count in counts.items() if count > 1]


def _is_inside(path: Path, folder: str) -> bool:
    """With links followed: a downloaded folder must not reach what else is on this machine."""
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


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def filter_rows(
    rows: list[dict[str, object]], where: Mapping[str, tuple[str, ...]], root: Path
) -> list[dict[str, object]]:
    for key, allowed in where.items():
        present = Counter(_as_text(row.get(key)) for row in rows)
        if not any(key in row for row in rows):
            raise UserError(f"no picture of {root} has the field {key!r}")
        rows = [row for row in rows if _as_text(row.get(key)) in allowed]
        if not rows:
            values = ", ".join(repr(value) for value, _ in present.most_common(_SHOWN * 3))
            raise UserError(f"no picture of {root} has {key} in {allowed}; there are {values}")
    return rows


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


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)

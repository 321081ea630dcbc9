"""Captioned pictures in every layout that is read: folders, shards, parquet files.

A folder is in the layout of Hugging Face `imagefolder`: metadata (`latentdiff.data.metadata`) at
its top or in its folders, as `train/metadata.jsonl`; or caption files beside the pictures
(`latentdiff.data.caption_files`); or it holds shards (`latentdiff.data.shards`) or parquet files
(`latentdiff.data.parquet`). What systems and programs leave in folders is no data, and what may
have been meant as data and is not read is logged.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from latentdiff.data.caption_files import (
    caption_files,
    has_caption,
    rows_of_pictures,
    tell,
    tell_left_out,
)
from latentdiff.data.examples import Example, Row, filter_rows, make_example
from latentdiff.data.listing import is_inside, list_files
from latentdiff.data.metadata import METADATA, is_metadata, refuse, rows_of_metadata
from latentdiff.data.parquet import columns_of_parquet, rows_of_parquet
from latentdiff.data.shards import expand, rows_of_shards
from latentdiff.errors import UserError, shown
from latentdiff.picture_formats import NAMES, SUFFIXES

_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")
_ARCHIVES = (".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".rar", ".7z")

_log = logging.getLogger(__name__)


def read_folder(
    root: str | Path, *, where: Mapping[str, tuple[str, ...]] | None = None
) -> list[Example]:
    """Lists captioned pictures in the order of their metadata (of their names, without metadata).

    Args:
        root: a folder; a parquet or tar file; or several: `shards/{00000..00099}.tar`,
            `data/*.parquet`.
        where: for each field named, the values to keep, compared as text; a missing value is "".
            `{"style": ("noto",), "split": ("train",)}`.

    Raises:
        UserError: as `list_folder`, or a picture is missing or has no caption that can be used.
    """
    return read_parts(root, [where or {}])[0]


def read_parts(
    root: str | Path, parts: Sequence[Mapping[str, tuple[str, ...]]]
) -> list[list[Example]]:
    """Several parts of what `read_folder` lists, each by its own `where`, at one look.

    Raises:
        UserError: see `read_folder`.
    """
    rows = _rows(Path(root))
    found = [_examples(rows, where, Path(root)) for where in parts]
    for examples in found:
        _check_usable(examples, root)
    return found


def list_folder(
    root: str | Path, *, where: Mapping[str, tuple[str, ...]] | None = None
) -> list[Example]:
    """The same without a look at the single pictures: some may be missing or lack a caption.

    Raises:
        UserError: no folder, no pictures, repeated files, files outside the folder, malformed or
            unreadable metadata, shards or parquet files, or a `where` that keeps nothing.
    """
    return _examples(_rows(Path(root)), where or {}, Path(root))


def _rows(root: Path) -> list[Row]:
    if root.is_dir():
        rows = _rows_of_folder(root)
    elif root.suffix.casefold() == ".tar":
        rows = rows_of_shards(expand(root))
    elif root.suffix.casefold() == ".parquet":
        rows = _rows_of_parquets(expand(root), root.parent)
    else:
        raise UserError(_no_folder(root))
    if not rows:
        raise UserError(f"{root} holds no pictures ({NAMES})")
    return rows


def _examples(rows: list[Row], where: Mapping[str, tuple[str, ...]], root: Path) -> list[Example]:
    examples = [make_example(root, row) for row in filter_rows(rows, where, root)]
    if root.is_dir():
        inside = os.path.realpath(root)
        files = [example for example in examples if _is_file(example)]
        _refuse_where(
            files, lambda e: not is_inside(e.path, inside), "lie outside the folder", root
        )
    return examples


def _check_usable(examples: Sequence[Example], root: str | Path) -> None:
    _refuse_where(examples, _is_missing, "are missing", root)
    faulty = [example.fault for example in examples if example.fault]
    if faulty:
        more = f" (and {len(faulty) - 1} more like it)" if len(faulty) > 1 else ""
        raise UserError(f"{root}: {faulty[0]}{more}")
    _refuse_where(examples, lambda example: not example.captions, "have no caption", root)


def held_out(
    root: Path, count: int, *, where: Mapping[str, tuple[str, ...]] | None = None
) -> list[Example]:
    """At most `count` pictures of a folder whose field `split` names a test, evenly spread.

    Raises:
        UserError: see `list_folder`; or some lack the field, or no picture is held out.
    """
    examples = list_folder(root, where=where)
    check_fields(examples, ("split",), root)
    others = [e for e in examples if str(e.fields["split"]).startswith("test")]
    if not others:
        which = " of those asked for" if where else ""
        raise UserError(f"{root}: no picture{which} is held out.")
    shown = min(count, len(others))
    return [others[number * len(others) // shown] for number in range(shown)]


def check_fields(examples: Sequence[Example], names: Sequence[str], root: Path) -> None:
    """Pass if every picture's metadata has these fields, be they empty.

    Raises:
        UserError: some lack one.
    """
    for name in names:
        _refuse_where(
            examples, lambda e, name=name: name not in e.fields, f"lack the field {name!r}", root
        )


def _no_folder(root: Path) -> str:
    """Why a path that is neither folder nor shards nor parquet cannot be read."""
    if not os.path.lexists(root):
        return f"there is no picture folder {root}"
    if is_metadata(root):
        return f"{root} is a metadata file: name the folder that it lies in"
    if root.suffix.casefold() in _ARCHIVES:
        return f"{root} is packed: unpack it into a folder, and name that"
    return f"{root} is no folder: name the one that holds the pictures"


def _rows_of_folder(root: Path) -> list[Row]:
    listing = list_files(root)
    described = _described(root, listing.files)
    covered = {path.parent for path in described}
    captions = caption_files(listing.files)
    pictures = [path for path in listing.files if path.suffix.casefold() in SUFFIXES]
    rows = [row for path in described for row in rows_of_metadata(path, root)]
    listed = {row.path for row in rows}
    loose = [path for path in pictures if covered.isdisjoint(path.parents)]
    missed = [
        path for path in set(pictures).difference(loose, listed) if has_caption(path, captions)
    ]
    tell(
        sorted(missed), "left out, as no metadata lists them, though captions lie beside them", root
    )
    own = rows_of_pictures(loose, captions, root)
    rows += own
    packed = [path for path in listing.files if path.suffix.casefold() in (".tar", ".parquet")]
    packed = [path for path in packed if path not in described]
    if packed and not any(map(_is_captioned, rows)):
        rows = _rows_of_packed(packed, rows, root) or rows
    elif packed:
        tell(packed, "left out, as the captioned pictures beside them are read", root)
    if own:
        tell_left_out(listing.files, captions, root)
    if not rows and listing.left_out:
        some = shown(listing.left_out[0], 100)
        raise UserError(f"{root} holds no pictures ({NAMES}); {some} and its like are left out")
    _name_splits(rows, root)
    return rows


def _is_captioned(row: Row) -> bool:
    return bool(row.fault) or any(row.fields.get(key) for key in ("text", "captions", "caption"))


def _described(root: Path, files: Sequence[Path]) -> list[Path]:
    """The metadata files: the one at the top, or those of the folders below.

    Raises:
        UserError: a folder has two, or one lies outside.
    """
    there = filter(is_metadata, root.iterdir())  # one may be a folder, or a link: told later
    found = list(there) or list(filter(is_metadata, files))
    found.sort(key=lambda path: (path.parent, METADATA.index(path.name.casefold())))
    inside = os.path.realpath(root)
    for path, following in pairwise([*found, Path()]):
        if path.parent == following.parent:
            raise UserError(f"{path.parent} has both {path.name} and {following.name}: keep one")
        if not is_inside(path, inside):
            raise UserError(f"{path} lies outside the folder: put a copy into it")
    return found


def _rows_of_packed(packed: Sequence[Path], loose: list[Row], root: Path) -> list[Row]:
    """List the rows of the shards of a folder or, without any, of its parquet files.

    Without captions they are read only if there is nothing else, no loose picture: a packed copy of
    the pictures may lie beside them. Tables that `img2dataset` writes beside its shards are passed
    over.
    """
    inside = os.path.realpath(root)
    for path in packed:
        if not is_inside(path, inside):
            raise UserError(f"{path} lies outside the folder: put a copy into it")
    shards = [path for path in packed if path.suffix.casefold() == ".tar"]
    tables = [path for path in packed if path not in shards]
    try:
        rows = rows_of_shards(shards)
        if not any(map(_is_captioned, rows)):
            rows = _rows_of_parquets(tables, root, needed=not (rows or loose)) or rows
    except UserError as error:
        if not loose:
            raise
        _log.warning("%s: the pictures beside it are read", error)
        return []
    if loose and not any(map(_is_captioned, rows)):
        tell(packed, "left out, as the pictures beside them are read", root)
        return []
    named = {row.path for row in rows}
    bare = [row.path for row in loose if row.path not in named]
    tell(bare, "left out, as they have no captions", root)
    return rows


def _rows_of_parquets(paths: Sequence[Path], root: Path, *, needed: bool = True) -> list[Row]:
    """The pictures that parquet files hold, and their captions; some of the files may hold none.

    Raises:
        UserError: none holds any, though pictures are needed.
    """
    rows = [row for path in paths for row in rows_of_parquet(path, root) or []]
    if paths and not rows and needed:
        raise UserError(
            f"{paths[0]} has no column image that holds pictures ({{bytes, path}}), but "
            f"{', '.join(columns_of_parquet(paths[0])[:9])}"
        )
    return rows


def _name_splits(rows: Sequence[Row], root: Path) -> None:
    """Give rows of `train/`, `test-00000.tar` and the like the field `split`, where there are
    several, and say so."""
    splits = {row.path: _split_of(row, root) for row in rows if "split" not in row.fields}
    names = sorted({name for name in splits.values() if name})
    if len(names) < 2:
        return
    for row in rows:
        if name := splits.get(row.path):
            row.fields["split"] = name
    told = "%s has the splits %s: all are read; data.where.split=[%s] keeps one"
    _log.warning(told, shown(root), ", ".join(names), max(names, key="train".__eq__))


def _split_of(row: Row, root: Path) -> str:
    """The split that a path tells of: by its folders, and by the name of a file that holds many."""
    if not row.path.is_relative_to(root):
        return ""
    parts = [part.casefold() for part in row.path.relative_to(root).parts]
    named = parts if row.span or row.cell else parts[:-1]
    words = [word for part in named for word in part.replace("_", "-").replace(".", "-").split("-")]
    return next((word for word in words if word in _SPLITS), "")


def _is_file(example: Example) -> bool:
    return example.span is None and example.cell is None


def _is_missing(example: Example) -> bool:
    try:
        return _is_file(example) and not example.path.is_file()
    except OSError:  # a name that is too long
        return True


def _refuse_where(
    examples: Sequence[Example],
    applies: Callable[[Example], bool],
    complaint: str,
    root: str | Path,
) -> None:
    names = [str(example.fields["file_name"]) for example in examples if applies(example)]
    refuse(names, complaint, Path(root))

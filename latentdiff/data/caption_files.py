"""Pictures with a caption file of the same name: `a.png` and `a.txt`, or `a.caption`."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentdiff.data.examples import Row
from latentdiff.data.listing import is_inside
from latentdiff.errors import shown
from latentdiff.picture_formats import NAMES, SUFFIXES
from latentdiff.reading import read_text, reason

_ENDINGS = (".txt", ".caption")  # the first that is there is read
_MAX_CAPTION = 2**20
_NOTES = frozenset({"readme", "license", "licence", "copying", "notice", "changelog"})
# Pictures of kinds that are not read, with a caption beside them or not.
_FOREIGN = frozenset(
    {
        *(".gif", ".tif", ".tiff", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".psd", ".tga"),
        *(".svg", ".ico", ".ppm", ".pgm", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw"),
    }
)

_log = logging.getLogger(__name__)

CaptionFiles = Mapping[tuple[Path, str], Mapping[str, Path]]
"""(folder, stem) -> ending -> file."""


def caption_files(files: Sequence[Path]) -> CaptionFiles:
    """Find the caption files of a folder, whatever the case of their endings."""
    found: dict[tuple[Path, str], dict[str, Path]] = {}
    for path in files:
        if (ending := path.suffix.casefold()) in _ENDINGS:
            found.setdefault((path.parent, path.stem), {}).setdefault(ending, path)
    return found


def rows_of_pictures(pictures: Sequence[Path], captions: CaptionFiles, root: Path) -> list[Row]:
    """A row for each picture, with the lines of its caption file; without one, no captions."""
    inside = os.path.realpath(root)
    rows: list[Row] = []
    for picture in pictures:
        lines, fault = _lines(picture, captions, root, inside)
        name = picture.relative_to(root).as_posix()
        rows.append(Row({"file_name": name, "captions": lines}, picture, fault=fault))
    return rows


def has_caption(picture: Path, captions: CaptionFiles) -> bool:
    """Tell whether there is a caption file beside a picture."""
    return (picture.parent, picture.stem) in captions


def tell_left_out(files: Sequence[Path], captions: CaptionFiles, root: Path) -> None:
    """Log what lies between the pictures and is not used, though it may have been meant to be."""
    read = {(path.parent, path.stem) for path in files if path.suffix.casefold() in SUFFIXES}
    foreign = [
        path
        for path in files
        if path.suffix.casefold() not in (*SUFFIXES, *_ENDINGS)
        and (path.parent, path.stem) not in read
        and path.stem.casefold() not in _NOTES
        and (path.suffix.casefold() in _FOREIGN or has_caption(path, captions))
    ]
    tell(foreign, f"left out, as no {NAMES} pictures; convert them", root)
    known = {
        (path.parent, path.stem) for path in (*files,) if path.suffix.casefold() not in _ENDINGS
    }
    alone = [next(iter(own.values())) for key, own in captions.items() if key not in known]
    alone = [path for path in alone if path.stem.casefold() not in _NOTES]
    if len(alone) < len(captions):  # else these are no captions
        tell(alone, "captions without a picture", root)
    second = [own[_ENDINGS[1]] for own in captions.values() if len(own) > 1]
    tell(second, f"left out, as the {_ENDINGS[0]} of the same name is read", root)


def tell(paths: Sequence[Path], what: str, root: Path) -> None:
    """Log what is said of some files of a folder, and the first of their names."""
    if paths:
        names = ", ".join(shown(path.relative_to(root), 100) for path in paths[:3])
        more = f", ... ({len(paths)} in all)" if len(paths) > 3 else ""
        _log.warning("%s: %s: %s%s", shown(root), what, names, more)


def _lines(picture: Path, captions: CaptionFiles, root: Path, inside: str) -> tuple[list[str], str]:
    """The lines of a picture's caption file, and why it cannot be read."""
    caption = picture.with_suffix(_ENDINGS[0])
    if not os.path.lexists(caption):
        own = captions.get((picture.parent, picture.stem), {})
        found = next((own[ending] for ending in _ENDINGS if ending in own), None)
        if found is None:
            return [], ""
        caption = found
    name = caption.relative_to(root).as_posix()
    if not is_inside(caption, inside):
        return [], f"{name} lies outside the folder: put a copy into it"
    try:
        return read_text(caption, _MAX_CAPTION).splitlines(), ""
    except (OSError, UnicodeDecodeError) as error:
        return [], f"{name} cannot be read: {reason(error)}"

"""The files below a folder that somebody put there: not what systems and programs leave behind."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from latentdiff.data.examples import Example
from latentdiff.errors import UserError, shown
from latentdiff.reading import reason

# Of macOS, Windows, Synology and ext4. Hidden ones (._a.txt, .DS_Store, .thumbnails,
# .ipynb_checkpoints) are known by their dot.
_DROPPINGS = frozenset(
    {
        *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin"),
        *("system volume information", "@eadir", "#recycle", "lost+found"),
    }
)

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Listing:
    """Contents of a folder.

    Attributes:
        files: all files, in the order of their paths; links to folders are not followed.
        left_out: names of hidden files and folders, and of other droppings.
    """

    files: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def is_dropping(name: str) -> bool:
    """Tell whether a file or folder is hidden, or left behind by an operating system."""
    return name.startswith(".") or name.casefold() in _DROPPINGS


def list_files(root: Path) -> Listing:
    """Every file below a folder; what cannot be looked into is logged."""
    listing = Listing()

    def unread(error: OSError) -> None:
        _log.warning("%s cannot be read: %s", shown(error.filename), reason(error))

    for folder, folders, names in os.walk(root, onerror=unread):
        listing.left_out += [name for name in (*folders, *names) if is_dropping(name)]
        listing.files += [Path(folder, name) for name in names if not is_dropping(name)]
        folders[:] = [name for name in folders if not is_dropping(name)]
        for link in (path for name in folders if (path := Path(folder, name)).is_symlink()):
            _log.warning("%s is a link to a folder, and not followed", shown(link))
    listing.files.sort()
    return listing


def path_beside(example: Example, field: str, root: Path, what: str) -> Path:
    """The path of the file that a field of a picture's metadata names, relative to the data.

    Args:
        example: the picture.
        field: of its metadata.
        root: the folder of the data, or a file in it.
        what: of the file, for messages.

    Raises:
        UserError: the field names none, or one outside the folder.
    """
    name, folder = example.fields.get(field), root if root.is_dir() else root.parent
    if not isinstance(name, str) or not name:
        raise UserError(f"{example.name}: its field {field!s:.40} names no {what}")
    if not is_inside(folder / name, os.path.realpath(folder)):
        raise UserError(f"{example.name}: its {what} lies outside {folder}")
    return folder / name


def is_inside(path: Path, folder: str) -> bool:
    """Tell whether a path, with links followed, lies in a folder given by `os.path.realpath`.

    A downloaded folder must not reach what else is on this machine.
    """
    try:
        return os.path.commonpath((folder, os.path.realpath(path))) == folder
    except ValueError:  # half a character: no file can have such a name, so nothing is reached
        return True

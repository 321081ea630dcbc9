"""Captions in a model's folder: a few hundred of what it was trained on, a line each.

They name what it knows, which a fine-tune must not unlearn. No weights depend on them.
"""

from collections.abc import Sequence
from pathlib import Path

from latentdiff.errors import UserError
from latentdiff.reading import read_text, reason

FILE = "captions.txt"
_MOST = 2**20  # bytes


def read_captions(folder: Path) -> tuple[str, ...]:
    """The lines of a model folder's captions.txt that are not blank; none where it has no such.

    Raises:
        UserError: it cannot be read, or is no text of at most 1 MiB.
    """
    path = folder / FILE
    if not path.exists():
        return ()
    try:
        lines = read_text(path, _MOST).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not captions, a line each ({reason(error)})") from None
    return tuple(line.strip() for line in lines if line.strip())


def write_captions(captions: Sequence[str], stage: Path) -> None:
    """Write captions.txt into a folder that is being written, if there are any."""
    if captions:
        (stage / FILE).write_text("".join(f"{line}\n" for line in captions), "utf-8")

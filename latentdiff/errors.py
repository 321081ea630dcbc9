"""A user's mistakes, and what a user should know, each in one line."""

import math
import re
import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)

LONGEST = 1500  # characters of a message; the longest of ours, a list of names, has fewer

# Control characters, halves of UTF-16 pairs, and marks that turn the direction of writing: what a
# terminal obeys instead of showing. Joiners stay: emoji are made with them.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: object, most: int = LONGEST) -> str:
    """A text for a terminal: one line, nothing in it that a terminal obeys, the middle cut out
    beyond `most` characters."""
    line = str(text)
    if len(line) > most:
        line = f"{line[: most * 2 // 3]} ... {line[-(most // 4) :]}"
    return _UNSHOWN.sub(_spelled, line)


def _spelled(found: re.Match[str]) -> str:
    if found[0] in "\n\r\t":
        return " "
    return found[0].encode("unicode_escape").decode("ascii")


class UserError(ValueError):
    """A mistake of the user: the message is one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2. Names out of files are
    in messages, so each is made fit for a terminal here, see `shown`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message))


def check_finite(value: float, name: str) -> None:
    """Check that an argument is a finite number.

    Raises:
        UserError: it is not.
    """
    try:
        passes = math.isfinite(value) and not isinstance(value, bool)
    except (TypeError, OverflowError):
        passes = False
    if not passes:
        raise UserError(f"{name}: must be a finite number, not {value!r:.40}.")


def warn(message: str) -> None:
    """Warn at the line outside this package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)

"""A user's mistakes, and what a user should know, each in one line."""

import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


class UserError(ValueError):
    """A mistake of the user: the message is one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def warn(message: str) -> None:
    """Warn at the line outside this package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)

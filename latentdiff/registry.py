"""Names that a user may type, with a helpful error for those that do not exist."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from latentdiff.errors import UserError


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Pass if `name` is one of `known`.

    Args:
        kind: what is being named, for the message ("solver", "timetable", ...).
        name: what the user typed.
        known: the names that exist.

    Raises:
        UserError: the name is unknown; the message offers the closest one, or all of them.
    """
    names = list(known)
    if name in names:
        return
    close = get_close_matches(spelled(str(name)), names, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"choose one of: {', '.join(names)}."
    raise UserError(f"unknown {kind} '{name!s:.200}': {hint}")


def spelled(name: str) -> str:
    """A name as most of ours are spelled: lower case, "++" as "pp", its words joined by "-"."""
    return re.sub(r"[\s_-]+", "-", name.strip().lower().replace("++", "pp"))

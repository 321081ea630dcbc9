"""Guides by name, for those that one scale is enough to tell."""

from collections.abc import Callable, Sequence

from latentdiff.errors import UserError
from latentdiff.guides.attention import PAG, SEG, SpoilsAttention
from latentdiff.registry import check_name

Guide = SpoilsAttention

_KINDS: dict[str, Callable[[float], Guide]] = {"pag": PAG, "seg": SEG}


def resolve(guides: Sequence[Guide | str]) -> list[Guide]:
    """The guides, with those that are text made: "pag:3" is `PAG(3.0)`, "seg:3" `SEG(3.0)`.

    Raises:
        UserError: one is no guide, has an unknown name or no scale.
    """
    return [_create(guide) if isinstance(guide, str) else _checked(guide) for guide in guides]


def _checked(guide: Guide) -> Guide:
    if not isinstance(guide, Guide):
        raise UserError(f"{guide!r:.60} is no guide; `latentdiff.guides` has them.")
    return guide


def _create(text: str) -> Guide:
    name, _, scale = text.partition(":")
    check_name("guide", name, _KINDS)
    try:
        return _KINDS[name](float(scale))
    except ValueError:
        raise UserError(f"a guide reads NAME:SCALE, as pag:3, not {text!r:.60}.") from None

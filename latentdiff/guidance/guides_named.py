"""Guides by name, for those that one scale and a few words are enough to tell."""

import math
from collections.abc import Sequence

import torch

from latentdiff.errors import UserError
from latentdiff.guidance.attention_guides import PAG, SEG, SpoilsAttention
from latentdiff.guidance.classifier import Classifier
from latentdiff.guidance.clip import Clip
from latentdiff.guidance.gradient_guides import ClassifierGuide, ClipGuide, SteersEstimate
from latentdiff.registry import check_name

Guide = SpoilsAttention | SteersEstimate

_KINDS = ("pag", "seg", "clip", "classifier")
_FORM = "pag:3, seg:3, clip:SCALE:FOLDER or classifier:SCALE:FOLDER:LABEL"


def resolve(guides: Sequence[Guide | str], device: torch.device) -> list[Guide]:
    """The guides, with those that are text made.

    "pag:3" is `PAG(3.0)`; "seg:3" is `SEG(3.0)`; "clip:2:FOLDER" is `ClipGuide(Clip.load(FOLDER),
    2.0)`; and "classifier:2:FOLDER:LABEL" is a `ClassifierGuide`.

    Args:
        guides: values or text.
        device: where to load what is loaded.

    Raises:
        UserError: one is no guide, has an unknown name, no scale, or a folder that does not load.
    """
    return [_create(g, device) if isinstance(g, str) else _checked(g) for g in guides]


def _checked(guide: Guide) -> Guide:
    if not isinstance(guide, Guide):
        raise UserError(f"{guide!r:.60} is no guide; `latentdiff.guidance.guides` has them.")
    return guide


def _create(text: str, device: torch.device) -> Guide:
    name, *given = text.split(":", 1)
    check_name("guide", name, _KINDS)
    number, *words = given[0].split(":", 1) if given else ("",)
    scale = _scale(number)
    folder, _, label = words[0].rpartition(":") if words and name == "classifier" else ("", "", "")
    if scale is not None and name in ("pag", "seg") and not words:
        return PAG(scale) if name == "pag" else SEG(scale)
    if scale is not None and name == "clip" and words:
        return ClipGuide(Clip.load(words[0], device), scale)
    if scale is not None and folder and label:
        return ClassifierGuide(Classifier.load(folder, device), label, scale)
    raise UserError(f"a guide reads {_FORM}, not {text!r:.80}.")


def _scale(text: str) -> float | None:
    try:
        scale = float(text)
    except ValueError:
        return None
    return scale if math.isfinite(scale) else None

"""Edits in the words of a command line: "pag:3", "threshold:0.995", "hires:2:0.5"."""

import math
import re
from collections.abc import Sequence

import torch

from latentdiff.bundle import Bundle
from latentdiff.diffusion.edits import Edit
from latentdiff.editing import Hires, TiledDiffusion
from latentdiff.errors import UserError
from latentdiff.formats.location import public_name
from latentdiff.guidance.autoguidance import Autoguidance
from latentdiff.guidance.classifier import Classifier
from latentdiff.guidance.classifier_guidance import ClassifierGuide
from latentdiff.guidance.clip import Clip
from latentdiff.guidance.clip_guidance import ClipGuide
from latentdiff.guidance.perturbed_attention import PAG, SEG
from latentdiff.guidance.thresholding import DynamicThresholding
from latentdiff.registry import check_name

_KINDS = ("pag", "seg", "threshold", "autoguidance", "clip", "classifier", "hires", "tiled")
_STEPS = re.compile(r"\d{1,4}")
_READING = ("autoguidance", "clip", "classifier")  # those that read a file, the word after SCALE
FORM = (
    "pag:SCALE, seg:SCALE, threshold:QUANTILE, autoguidance:SCALE:MODEL, clip:SCALE:FOLDER, "
    "classifier:SCALE:FOLDER:LABEL, hires:FACTOR:STRENGTH[:STEPS] or tiled:OVERLAP"
)


def check_text(text: str) -> tuple[str, float, list[str]]:
    """Parse a guide's text into its name, number and further words, before anything is loaded.

    Raises:
        UserError: the text has none of the forms in `FORM`.
    """
    name, *given = text.split(":", 1)
    check_name("guide", name, _KINDS)
    number, *rest = given[0].split(":", 1) if given else ("",)
    words = rest
    if name == "classifier" and rest:
        folder, _, label = rest[0].rpartition(":")
        words = [folder, label]
    if name == "hires" and rest:
        words = rest[0].split(":", 1)
    wanted = {"autoguidance": 1, "clip": 1, "classifier": 2, "hires": len(words[:2]) or 1}
    value = _number(number)
    if value is None or len(words) != wanted.get(name, 0) or not all(words):
        raise UserError(f"a guide reads {FORM}, not {text!r:.80}.")
    if name == "hires":
        _hires(value, words, text)
    if name == "tiled":
        TiledDiffusion(value)
    return name, value, words


def second_pass(edits: Sequence[Edit | str]) -> Hires | None:
    """The first of the guides in words that enlarges the picture, for its factor and its steps."""
    for edit in edits:
        if isinstance(edit, str):
            name, value, words = check_text(edit)
            if name == "hires":
                return _hires(value, words, edit)
    return None


def file_of(text: str) -> str | None:
    """The file or folder that a guide's text names; None where it names none."""
    name, _, words = check_text(text)
    return words[0] if name in _READING else None


def public_guide(text: str) -> str:
    """A guide's text for others to read: of its file's path what `public_name` leaves."""
    path = file_of(text)
    if path is None:
        return text
    name, number, rest = text.split(":", 2)
    return f"{name}:{number}:{public_name(path)}{rest.removeprefix(path)}"


def resolve(edits: Sequence[Edit | str], device: torch.device) -> list[Edit]:
    """The edits, with those that are text made; see `FORM`.

    Args:
        edits: values or text.
        device: device for the models that are loaded.

    Raises:
        UserError: a text has an unknown name, no number, or a folder that does not load.
    """
    return [_create(edit, device) if isinstance(edit, str) else edit for edit in edits]


def _create(text: str, device: torch.device) -> Edit:
    name, value, words = check_text(text)
    if name == "pag":
        return PAG(value)
    if name == "seg":
        return SEG(value)
    if name == "threshold":
        return DynamicThresholding(value)
    if name == "hires":
        return _hires(value, words, text)
    if name == "tiled":
        return TiledDiffusion(value)
    if name == "autoguidance":
        return Autoguidance(Bundle.load(words[0], device=device, engine="auto"), value)
    if name == "clip":
        return ClipGuide(Clip.load(words[0], device), value)
    return ClassifierGuide(Classifier.load(words[0], device), words[1], value)


def _hires(factor: float, words: list[str], text: str) -> Hires:
    strength = _number(words[0])
    if strength is None or not all(map(_STEPS.fullmatch, words[1:])):
        raise UserError(f"a guide reads {FORM}, not {text!r:.80}.")
    return Hires(factor, strength, int(words[1]) if words[1:] else None)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

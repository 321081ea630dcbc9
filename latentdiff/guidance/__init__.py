"""Guidance: a denoiser with conditions in, a better denoiser out."""

from latentdiff.guidance import named
from latentdiff.guidance.batch import together
from latentdiff.guidance.classifier_free import classifier_free
from latentdiff.guidance.further import (
    cfg_plus_plus,
    from_classifier,
    from_weaker,
    projected,
    thresholded,
    weighted,
)

__all__ = [
    "cfg_plus_plus",
    "classifier_free",
    "from_classifier",
    "from_weaker",
    "named",
    "projected",
    "thresholded",
    "together",
    "weighted",
]

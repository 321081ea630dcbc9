"""Guidance: a denoiser with conditions in, a better denoiser out."""

from latentdiff.guidance import named
from latentdiff.guidance.batch import together
from latentdiff.guidance.cfg import classifier_free
from latentdiff.guidance.composition import composed
from latentdiff.guidance.further import (
    cfg_plus_plus,
    from_classifier,
    from_weaker,
    projected,
    thresholded,
    weighted,
)
from latentdiff.guidance.gradient import from_estimate
from latentdiff.guidance.perturbed_attention import perturbed

__all__ = [
    "cfg_plus_plus",
    "classifier_free",
    "composed",
    "from_classifier",
    "from_estimate",
    "from_weaker",
    "named",
    "perturbed",
    "projected",
    "thresholded",
    "together",
    "weighted",
]

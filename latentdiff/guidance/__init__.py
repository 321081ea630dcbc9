"""Guidance: a denoiser with conditions in, a better denoiser out.

Those with a condition of their own are `methods`, of which a run has one; the others are edits, of
which it has as many as it likes.
"""

from latentdiff.guidance import methods
from latentdiff.guidance.apg import projected
from latentdiff.guidance.autoguidance import Autoguidance, from_weaker
from latentdiff.guidance.cfg import classifier_free
from latentdiff.guidance.cfgpp import cfg_plus_plus
from latentdiff.guidance.classifier import Classifier
from latentdiff.guidance.classifier_guidance import ClassifierGuide, from_classifier
from latentdiff.guidance.clip import Clip
from latentdiff.guidance.clip_guidance import ClipGuide
from latentdiff.guidance.composition import composed
from latentdiff.guidance.gradient import from_estimate
from latentdiff.guidance.perturbed_attention import PAG, SEG, perturbed
from latentdiff.guidance.thresholding import DynamicThresholding, thresholded

__all__ = [
    "PAG",
    "SEG",
    "Autoguidance",
    "Classifier",
    "ClassifierGuide",
    "Clip",
    "ClipGuide",
    "DynamicThresholding",
    "cfg_plus_plus",
    "classifier_free",
    "composed",
    "from_classifier",
    "from_estimate",
    "from_weaker",
    "methods",
    "perturbed",
    "projected",
    "thresholded",
]

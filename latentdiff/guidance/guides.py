"""Guides: values for `pipe(..., guides=[...])` that steer a run beside its guidance."""

from latentdiff.guidance.attention_guides import PAG, SEG, SpoilsAttention, spoil_attention
from latentdiff.guidance.classifier import Classifier
from latentdiff.guidance.clip import Clip
from latentdiff.guidance.gradient_guides import (
    ClassifierGuide,
    ClipGuide,
    Scene,
    SteersEstimate,
    steer,
)
from latentdiff.guidance.guides_named import Guide, resolve

__all__ = [
    "PAG",
    "SEG",
    "Classifier",
    "ClassifierGuide",
    "Clip",
    "ClipGuide",
    "Guide",
    "Scene",
    "SpoilsAttention",
    "SteersEstimate",
    "resolve",
    "spoil_attention",
    "steer",
]

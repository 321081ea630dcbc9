"""Guides: values for `pipe(..., guides=[...])` that steer a run beside its guidance."""

from latentdiff.guides.attention import PAG, SEG, SpoilsAttention, spoil_attention
from latentdiff.guides.classifier import Classifier
from latentdiff.guides.clip import Clip
from latentdiff.guides.gradient import ClassifierGuide, ClipGuide, Scene, SteersEstimate, steer
from latentdiff.guides.named import Guide, resolve

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

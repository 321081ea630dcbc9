"""Guidance: a denoiser with conditions in, a better denoiser out."""

from latentdiff.guidance.batch import together
from latentdiff.guidance.classifier_free import classifier_free

__all__ = ["classifier_free", "together"]

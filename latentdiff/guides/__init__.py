"""Guides: values for `pipe(..., guides=[...])` that steer a run beside its guidance."""

from latentdiff.guides.attention import PAG, SEG, SpoilsAttention, spoil_attention
from latentdiff.guides.named import Guide, resolve

__all__ = ["PAG", "SEG", "Guide", "SpoilsAttention", "resolve", "spoil_attention"]

"""The parts of one model: load, save, check."""

from latentdiff.bundle.model import Bundle
from latentdiff.bundle.scheduler import Steps

__all__ = ["Bundle", "Steps"]

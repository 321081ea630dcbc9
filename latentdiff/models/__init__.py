"""Builders of networks out of diffusers and transformers, and the two that exist only for training."""

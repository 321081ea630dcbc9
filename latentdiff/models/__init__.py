"""Builders of networks out of diffusers and transformers, and those that only training needs."""

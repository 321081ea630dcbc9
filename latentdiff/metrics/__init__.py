"""Metrics of image quality, text alignment and reconstruction."""

"""Losses, EMA, exact checkpoints and the Accelerate run: what both training stages share."""

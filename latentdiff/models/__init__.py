"""The three nouns of a model, what implements them, and builders of fresh networks."""

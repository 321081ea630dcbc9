"""Random numbers that depend on nothing but a key."""

import numpy as np


def philox(*key: int) -> np.random.Generator:
    """A counter-based generator of any key, of which zeros at the end are no part.

    For what is made or picked outside a training run; a run draws by `learning.order.generator`.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))

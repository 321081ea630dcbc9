"""Batches whose samples share a shape, as a pure function of (seed, step)."""

from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np

from latentdiff.learning.order import SampleOrder, Stream, generator

CYCLE = 256  # steps over which every bucket gets its share


class BucketOrder:
    """Order of the samples like `SampleOrder`, with every step's samples from one bucket.

    In a cycle of steps a bucket stands floor or ceil of its expected number of times (systematic
    resampling); within it, samples follow a `SampleOrder` of their own, which goes on from step to
    step. With one bucket it is that order.

    Args:
        buckets: the bucket of each sample.
        weights: probabilities of the samples [N], or None for all alike.
    """

    def __init__(
        self, buckets: Sequence[Hashable], seed: int, weights: np.ndarray | None = None
    ) -> None:
        weights = np.ones(len(buckets)) if weights is None else weights
        labels = list(dict.fromkeys(buckets))
        self.seed = seed
        self.members = [[i for i, own in enumerate(buckets) if own == label] for label in labels]
        self.orders = [
            SampleOrder(len(own), seed, weights[own], bucket)
            for bucket, own in enumerate(self.members)
        ]
        shares = np.array([weights[m].sum() for m in self.members]) / weights.sum()
        self.edges = np.cumsum(shares) * CYCLE
        self.before = [np.zeros(len(labels), dtype=np.int64)]
        self.cycle = lru_cache(maxsize=2)(self._cycle)

    def _cycle(self, number: int) -> np.ndarray:
        random = generator(self.seed, Stream.BUCKETS, number, 0)
        edges = np.floor(self.edges + random.random())
        edges[-1] = CYCLE
        counts = np.diff(np.minimum(edges, CYCLE), prepend=0.0).astype(np.int64)
        return random.permutation(np.repeat(np.arange(len(counts)), counts))

    def _earlier(self, cycle: int) -> np.ndarray:
        """Count the steps that each bucket had before a cycle."""
        while len(self.before) <= cycle:
            counts = np.bincount(self._cycle(len(self.before) - 1), minlength=len(self.members))
            self.before.append(self.before[-1] + counts)
        return self.before[cycle]

    def batch(self, step: int, size: int) -> list[int]:
        """The `size` sample numbers of optimizer step `step` (counted from 0)."""
        cycle, place = divmod(step, CYCLE)
        sequence = self.cycle(cycle)
        bucket = int(sequence[place])
        turn = int(self._earlier(cycle)[bucket] + (sequence[:place] == bucket).sum())
        members = self.members[bucket]
        return [members[i] for i in self.orders[bucket].batch(turn, size)]

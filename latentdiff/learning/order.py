"""Order of the samples: a pure function of (seed, step), so that a resumed run is exact."""

from collections.abc import Iterator, Sequence
from enum import IntEnum, unique
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from latentdiff.random_numbers import philox

Key = tuple[int, int, int]
"""Step, place in the global batch, sample number."""


def columns(keys: Sequence[Key]) -> tuple[int, list[int], list[int]]:
    """The step of some keys of one step, their places and their sample numbers."""
    return keys[0][0], [place for _, place, _ in keys], [sample for _, _, sample in keys]


@unique
class Stream(IntEnum):
    """Everything that a run draws at random, each from numbers of its own.

    Beside each stream stands what `when` and `which` of `generator` are. A number is part of every
    run's result: never change one, and give none a second meaning.
    """

    HELD_OUT = 0  # 0, 0: pictures that are put aside to measure on
    ORDER = 1  # epoch, bucket: the order of a bucket's samples
    NOISE = 2  # step, place: draws of the posterior, and the noise of x_t
    TIMES = 3  # step, 0: the offset of the times of a step
    CAPTION = 4  # step, place: the choice of a caption, or of none
    DISTURBANCE = 5  # step, place: the shift and the noise of CLIP's pictures
    BUCKETS = 6  # cycle, 0: the bucket of each step of a cycle
    PRIOR = 7  # number of a prior picture, 0: the seed that it is drawn with
    OFFSET_NOISE = 8  # step, place
    VARIANT = 9  # step, place: crop and flip
    DROPOUT = 10  # step, the first place of a micro-batch: the seed of the layers' dropout
    MASK = 11  # step, place: holes to be painted in
    GUIDANCE = 16  # step, place: the guidance scale that a distilled network is told
    MEASURE = 12  # number of a held-out picture, of its time: noise to measure with
    TAGS = 13  # sample number, place among its captions: the order of tags and which are left out
    CODE = 30  # step, place: the noise that a generator is told
    SHARDS = 20  # epoch, 0: the order of the shards
    LOW_RESOLUTION = 22  # step, place: level and noise of a small picture to be enlarged
    WINDOW = 21  # epoch, window: the order of its samples


def generator(seed: int, stream: Stream, when: int, which: int) -> np.random.Generator:
    """A generator that depends on nothing but its key, and shares it with no other.

    Every key is of exactly four 32-bit words: numpy fills shorter ones up with zeros, so that
    (7, 6) would be (7, 6, 0, 0), and spreads larger numbers over several words.

    Raises:
        ValueError: a part of the key does not fit into a word.
    """
    key = seed, int(stream), when, which
    if not all(0 <= part < 2**32 for part in key):
        raise ValueError(f"each of {key} must be from 0 to 2**32 - 1")
    return philox(*key)


class Order(Protocol):
    """Order of the samples: a pure function of the step."""

    def batch(self, step: int, size: int) -> list[int]:
        """The `size` sample numbers of optimizer step `step` (counted from 0)."""
        ...


class SampleOrder:
    """An endless shuffled stream of sample numbers, addressed by position.

    An epoch is `len(weights)` draws. Within it sample i stands floor or ceil of its expected
    number of times (systematic resampling), in an order that is a function of (seed, epoch).

    Args:
        weights: probabilities [N], or None for all alike.
        bucket: its number, where there are several: each has an order of its own.
    """

    def __init__(
        self, count: int, seed: int, weights: np.ndarray | None = None, bucket: int = 0
    ) -> None:
        if count < 1:
            raise ValueError("an order needs at least one sample")
        self.count = count
        self.seed = seed
        self.bucket = bucket
        self.weights = np.full(count, 1.0 / count) if weights is None else weights / weights.sum()
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, number: int) -> np.ndarray:
        random = generator(self.seed, Stream.ORDER, number, self.bucket)
        edges = np.floor(np.cumsum(self.weights) * self.count + random.random())
        edges[-1] = self.count
        repeats = np.diff(np.minimum(edges, self.count), prepend=0.0).astype(np.int64)
        return random.permutation(np.repeat(np.arange(self.count), repeats))

    def batch(self, step: int, size: int) -> list[int]:
        """The `size` sample numbers of optimizer step `step` (counted from 0)."""
        first = step * size
        return [
            int(self.epoch((first + k) // self.count)[(first + k) % self.count])
            for k in range(size)
        ]


class Shares:
    """This process's share of each step: lists of (step, place in the global batch, sample number).

    A batch sampler for a DataLoader, or to be walked through as it is. `batch_size` is the global
    one, a multiple of `world`.
    """

    def __init__(
        self, order: Order, steps: range, batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        self.order = order
        self.steps = steps
        self.batch_size = batch_size
        size = batch_size // world
        self.places = range(rank * size, (rank + 1) * size)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Key]]:
        for step in self.steps:
            samples = self.order.batch(step, self.batch_size)
            yield [(step, place, samples[place]) for place in self.places]


def sample_noise(
    seed: int, step: int, places: list[int], shape: tuple[int, ...], draws: int = 1
) -> Tensor:
    """Standard normal [draws, B, *shape], float32: picture by picture f(seed, step, place)."""
    rows = [
        generator(seed, Stream.NOISE, step, place).standard_normal(
            (draws, *shape), dtype=np.float32
        )
        for place in places
    ]
    return torch.from_numpy(np.stack(rows, axis=1))


def spread_uniform(seed: int, step: int, places: list[int], batch_size: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 [B], spread evenly over the global batch.

    (u + place / batch_size) mod 1 with one u = f(seed, step): the low-discrepancy times of
    Kingma et al. 2021 (Variational Diffusion Models), appendix I.1.
    """
    first = generator(seed, Stream.TIMES, step, 0).random()
    return (first + torch.tensor(places, dtype=torch.float64) / batch_size) % 1.0


class WindowOrder:
    """An endless shuffled stream over shards of which only a few are at hand at a time.

    In an epoch the shards come in a random order, in windows of `window`; the samples of a window
    come in a random order. Both are functions of (seed, epoch), so a position is a number, and to
    go on from it no earlier shard is needed. Samples are numbered through the shards.
    """

    def __init__(self, counts: list[int], seed: int, window: int) -> None:
        self.counts = np.array(counts)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.count = int(self.starts[-1])
        if self.count < 1:
            raise ValueError("an order needs at least one sample")
        self.seed = seed
        self.size = window
        self.windows = lru_cache(maxsize=2)(self._windows)
        self.inside = lru_cache(maxsize=2)(self._inside)

    def _windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in their order, and the position at which each window ends."""
        random = generator(self.seed, Stream.SHARDS, epoch, 0)
        shards: np.ndarray = random.permutation(len(self.counts))
        lasts = np.arange(self.size, len(shards) + self.size, self.size).clip(max=len(shards)) - 1
        return shards, np.cumsum(self.counts[shards])[lasts]

    def _inside(self, epoch: int, window: int) -> np.ndarray:
        """The sample numbers of a window, in their order."""
        shards = self.windows(epoch)[0][window * self.size : (window + 1) * self.size]
        numbers = [np.arange(int(self.starts[s]), int(self.starts[s + 1])) for s in shards]
        random = generator(self.seed, Stream.WINDOW, epoch, window)
        return random.permutation(np.concatenate(numbers))

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        ends = self.windows(epoch)[1]
        window = int(np.searchsorted(ends, place, side="right"))
        start = int(ends[window - 1]) if window else 0
        return int(self.inside(epoch, window)[place - start])

    def batch(self, step: int, size: int) -> list[int]:
        """The `size` sample numbers of optimizer step `step` (counted from 0)."""
        return [self._at(step * size + k) for k in range(size)]

"""Noise: one stream per picture, drawn on the CPU, so that no batch or device changes a picture."""

import hashlib
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from latentdiff.errors import UserError


class NoiseStreams:
    """A generator for each picture of a batch; picture i of seed s depends on (s, i) alone.

    Picture 0 of a seed below 2^32 draws what `torch.Generator().manual_seed(seed)` draws.

    Args:
        seed: one seed for pictures first .. first + count - 1; or a seed for each picture, each
            of which is then picture `first` of its own seed.
        first: index of the first picture.
        count: number of pictures; with a list of seeds, its length.

    Raises:
        UserError: a seed or an index is negative, or count disagrees with the list of seeds.
    """

    def __init__(self, seed: int | Sequence[int], first: int = 0, count: int | None = None) -> None:
        if isinstance(seed, int):
            pictures = [(seed, first + k) for k in range(1 if count is None else count)]
        else:
            pictures = [(s, first) for s in seed]
            if count not in (None, len(pictures)):
                raise UserError(f"{len(pictures)} seeds were given for {count} pictures.")
        self._generators = [_generator(s, index) for s, index in pictures]

    @classmethod
    def of(cls, pictures: Sequence[tuple[int, int]]) -> Self:
        """The streams of any (seed, index) pairs, in their order."""
        streams = cls([])
        streams._generators = [_generator(seed, index) for seed, index in pictures]
        return streams

    def __len__(self) -> int:
        return len(self._generators)

    @property
    def generators(self) -> list[torch.Generator]:
        """The generator of each picture, for code that draws by itself."""
        return self._generators

    def only(self, pictures: Sequence[int]) -> Self:
        """The same streams of some of the pictures."""
        streams = type(self)([])
        streams._generators = [self._generators[k] for k in pictures]
        return streams

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next standard normal noise of every picture.

        Args:
            shape: shape of one picture, [C, H, W].

        Returns:
            [B, C, H, W] float32 on the CPU.
        """
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators])

    def like(self, x: Tensor) -> Tensor:
        """The next noise for x [B, C, H, W], on its device and in its dtype."""
        drawn = self.draw(x.shape[1:])
        if x.is_cuda:  # pinned, so that the copy does not make the host wait for the device
            drawn = drawn.pin_memory()
        return drawn.to(device=x.device, dtype=x.dtype, non_blocking=True)


def _generator(seed: int, index: int) -> torch.Generator:
    if seed < 0 or index < 0:
        raise UserError(
            f"a seed must not be negative, but picture {index} of seed {seed} was asked."
        )
    if index or seed >= 2**32:  # torch's CPU generator itself uses only 32 bits of its seed
        digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "little")
    return torch.Generator().manual_seed(seed)

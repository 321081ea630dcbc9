"""The samples of a fine-tune: pictures as latents in every variant, with their weights."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.cache import LatentCache
from latentdiff.data.check import Checked
from latentdiff.data.examples import Example
from latentdiff.data.variants import Size, Variant, bucket_sizes, nearest_bucket
from latentdiff.errors import UserError
from latentdiff.learning.batches import to_range
from latentdiff.learning.buckets import BucketOrder
from latentdiff.learning.order import Stream, generator, sample_noise
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.identity import weights_hash
from latentdiff.pictures import to_uint8

_ENCODED_AT_ONCE = 2**19  # pixels


@dataclass(frozen=True)
class Samples:
    """Pictures to learn from, and pictures of the model's own that it is to keep.

    Attributes:
        contents: sha256 of each example's file.
        buckets: height and width in pixels that each example is trained at.
        moments: for each example [V, 2C, h, w], mean and std of its raw latents in V variants.
        shares: sampling weight of each, relative to the others [N].
        weights: weight of the loss of each [N].
        count: number of pictures to learn; the prior pictures come after them.
    """

    examples: list[Example]
    contents: list[str]
    buckets: list[Size]
    moments: list[Tensor]
    shares: np.ndarray
    weights: Tensor
    count: int

    @property
    def digest(self) -> str:
        """sha256 of names, contents, sizes and captions in order: the identity of the data."""
        rows = [
            f"{e.path.name} {content} {b} {list(e.captions)}"
            for e, content, b in zip(self.examples, self.contents, self.buckets, strict=True)
        ]
        return hashlib.sha256("\n".join(rows).encode(errors="surrogateescape")).hexdigest()

    def order(self, seed: int) -> BucketOrder:
        """Order the samples into batches, each from one bucket."""
        return BucketOrder(self.buckets, seed, self.shares)

    def variants(self, seed: int, step: int, places: list[int], samples: list[int]) -> list[int]:
        """Draw the variant (crop or flip) of each sample: a function of (seed, step, place)."""
        draws = [generator(seed, Stream.VARIANT, step, place) for place in places]
        counts = [len(self.moments[sample]) for sample in samples]
        return [int(draw.integers(count)) for draw, count in zip(draws, counts, strict=True)]

    def latents(
        self,
        autoencoder: Autoencoder,
        seed: int,
        step: int,
        places: list[int],
        chosen: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        """x_0 [B, C, h, w], drawn from the posteriors, and noise of its shape, on the CPU.

        Both are functions of (seed, step, place).

        Args:
            chosen: number and variant of each sample.
        """
        moments = torch.stack([self.moments[number][variant] for number, variant in chosen])
        shape = moments.shape[1] // 2, *moments.shape[2:]
        posterior, noise = sample_noise(seed, step, places, shape, 2)
        return autoencoder.draw(moments, posterior), noise

    def parted(self, held: Sequence[int]) -> tuple["Samples", "Samples"]:
        """The samples but for those of these numbers, and those."""
        kept = [number for number in range(len(self.examples)) if number not in set(held)]
        return self._only(kept), self._only(held)

    def _only(self, numbers: Sequence[int]) -> "Samples":
        return Samples(
            [self.examples[n] for n in numbers],
            [self.contents[n] for n in numbers],
            [self.buckets[n] for n in numbers],
            [self.moments[n] for n in numbers],
            self.shares[list(numbers)],
            self.weights[list(numbers)],
            len(numbers),
        )

    def joined(self, prior: "Samples", weight: float) -> "Samples":
        """These and prior ones, half of all draws each; `weight` is of the prior's loss."""
        return Samples(
            self.examples + prior.examples,
            self.contents + prior.contents,
            self.buckets + prior.buckets,
            self.moments + prior.moments,
            np.concatenate([self.shares / self.shares.sum(), prior.shares / prior.shares.sum()]),
            torch.cat([self.weights, weight * prior.weights]),
            self.count,
        )


def assign_buckets(sizes: Sequence[Size], size: Size, unit: int, many: bool) -> list[Size]:
    """The rectangle of each picture: always `size`, or the bucket of the nearest shape.

    Raises:
        UserError: `size` is not a multiple of `unit`.
    """
    if size[0] % unit or size[1] % unit:
        raise UserError(f"data.size must be a multiple of {unit} with this model, not {size[0]}")
    if not many:
        return [size] * len(sizes)
    buckets = bucket_sizes(size, unit)
    return [nearest_bucket(picture, buckets) for picture in sizes]


def encode_samples(
    autoencoder: Autoencoder,
    checked: Checked,
    buckets: list[Size],
    variants: Sequence[Variant],
    cache: Path,
    *,
    skip: bool = False,
) -> Samples:
    """Every picture's latents in every variant, from `cache` where they are there.

    Raises:
        UserError: a picture has gone, or has latents that are not finite and `skip` is off.
    """
    weights = weights_hash(autoencoder.module.state_dict())
    contents = [hashlib.sha256(example.read()).hexdigest() for example in checked.examples]
    moments: list[list[Tensor]] = [[] for _ in checked.examples]
    for bucket in dict.fromkeys(buckets):
        members = [number for number, own in enumerate(buckets) if own == bucket]
        for variant in variants:
            store = LatentCache(cache, weights, f"{variant.named(bucket)}; mean and std")
            found = store.latents(
                [checked.examples[number] for number in members],
                lambda example, v=variant, b=bucket: to_uint8(v.fill(example.open(), b)),
                lambda pictures: autoencoder.moments(to_range(pictures)),
                batch_size=max(1, min(64, _ENCODED_AT_ONCE // (bucket[0] * bucket[1]))),
            )
            for number, latent in zip(members, found, strict=True):
                moments[number].append(latent)
    stacked = [torch.stack(own) for own in moments]
    good = [n for n, own in enumerate(stacked) if bool(torch.isfinite(own).all())]
    if len(good) < len(stacked) and not skip:
        bad = next(n for n in range(len(stacked)) if n not in set(good))
        raise UserError(
            f"the autoencoder makes latents that are not finite of {checked.examples[bad].name}: "
            "take the picture out, or use --bad skip"
        )
    if not good:
        raise UserError("no picture is left to learn from")
    return Samples(
        [checked.examples[n] for n in good],
        [contents[n] for n in good],
        [buckets[n] for n in good],
        [stacked[n] for n in good],
        np.ones(len(good)),
        torch.ones(len(good)),
        len(good),
    )

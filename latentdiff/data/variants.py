"""Aspect-ratio buckets, crops and flips that fit a picture into its training resolution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to fill a bucket.

    Attributes:
        across: which part stays of what overhangs: 0 the left or upper, 0.5 the middle, 1 the
            right or lower end.
        flip: whether left and right are exchanged.
    """

    across: float = 0.5
    flip: bool = False

    def fill(self, image: Image.Image, size: Size) -> Image.Image:
        """The largest part of an RGB picture with the bucket's shape, resized to it (Lanczos)."""
        height, width = size
        scale = max(width / image.width, height / image.height)
        wide, high = min(image.width, width / scale), min(image.height, height / scale)
        left, top = (image.width - wide) * self.across, (image.height - high) * self.across
        box = (left, top, left + wide, top + high)
        filled = image.resize((width, height), Image.Resampling.LANCZOS, box)
        return ImageOps.mirror(filled) if self.flip else filled

    def named(self, size: Size) -> str:
        """The transform in words, for the key of a cache."""
        flipped = ", flipped" if self.flip else ""
        return f"filled {size[0]} x {size[1]} px at {self.across:g}{flipped}"


def variants(crops: int, flip: bool) -> list[Variant]:
    """Every variant of a picture: `crops` parts spread evenly over it, each flipped too if asked.

    One crop is the middle.
    """
    places = [0.5] if crops == 1 else [number / (crops - 1) for number in range(crops)]
    return [
        Variant(place, turned)
        for turned in ((False, True) if flip else (False,))
        for place in places
    ]


def bucket_sizes(size: Size, unit: int, longest: float = 2.0) -> list[Size]:
    """Shapes of about the area of `size` and no more, sides multiples of `unit`.

    Each height comes with the widest width that fits the area, as long as neither side is more
    than `longest` times the other.

    Args:
        unit: pixels; what the autoencoder and the U-Net halve must divide it.
    """
    area = size[0] * size[1]
    found = {size}
    for height in range(unit, int(math.sqrt(area * longest)) + 1, unit):
        width = area // height // unit * unit
        if width and max(height / width, width / height) <= longest:
            found.add((height, width))
    return sorted(found)


def nearest_bucket(picture: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose shape is nearest, by the ratio of the ratios."""
    shape = math.log(picture[0] / picture[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - shape))

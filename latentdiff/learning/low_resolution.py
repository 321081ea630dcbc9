"""Pairs of a large and a small picture, for a network that learns to enlarge."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.data.examples import Example, see_all
from latentdiff.editing.enlarge import as_large_as, noised
from latentdiff.editing.lowpass import enlarged
from latentdiff.errors import UserError
from latentdiff.learning.batches import to_range
from latentdiff.learning.order import Stream, generator
from latentdiff.models.network import LowResolution
from latentdiff.pictures import centre_square, to_uint8


class Pairs:
    """The pictures of a run in two sizes, decoded and kept, 3 bytes a pixel.

    Both are made of the file itself by Pillow's Lanczos filter, as whoever shrinks a picture does.

    Args:
        examples: the pictures.
        large: side in pixels.
        small: likewise, of what is enlarged.

    Raises:
        UserError: a picture cannot be read.
    """

    def __init__(self, examples: Sequence[Example], large: int, small: int) -> None:
        count = len(examples)
        self.large = torch.empty((count, 3, large, large), dtype=torch.uint8)
        self.small = torch.empty((count, 3, small, small), dtype=torch.uint8)

        def keep(index: int, image: Image.Image) -> None:
            self.large[index] = to_uint8(centre_square(image, large))
            self.small[index] = to_uint8(centre_square(image, small))

        for seen in see_all(examples, keep, "pictures", progress=False):
            if isinstance(seen, UserError):
                raise seen

    def pictures(self, samples: Sequence[int]) -> Tensor:
        """The large ones [B, 3, H, W] in [-1, 1]."""
        return to_range(self.large[list(samples)])

    def residuals(self, samples: Sequence[int]) -> Tensor:
        """Details that the small ones, enlarged by Lanczos's filter, lack [B, 3, H, W]."""
        large, small = self.pictures(samples), to_range(self.small[list(samples)])
        side = large.shape[-1]
        return large - enlarged(small, (side, side))

    def shown(
        self,
        low: LowResolution,
        seed: int,
        step: int,
        places: Sequence[int],
        samples: Sequence[int],
        size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Inputs of the network: what it sees of the small ones, and how much noise is in it.

        Conditioning augmentation, Ho et al. 2022 (CDM), section 4.2: a level for each picture,
        uniform from 0 to the highest; level and noise are functions of (seed, step, place).

        Returns:
            [B, 3, h, w], with `size` (h, w); and the levels, int64 [B].
        """
        draws = [generator(seed, Stream.LOW_RESOLUTION, step, place) for place in places]
        levels = torch.tensor([int(d.integers(low.max_noise_level + 1)) for d in draws])
        small = to_range(self.small[list(samples)])
        shape = small.shape[1:]
        eps = torch.from_numpy(
            np.stack([d.standard_normal(shape, dtype=np.float32) for d in draws])
        )
        return as_large_as(noised(low, small, eps, levels), size), levels

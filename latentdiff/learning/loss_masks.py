"""Weights of the places of a picture in the loss: masks beside pictures, or their alpha."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from latentdiff.data.examples import Example
from latentdiff.data.listing import path_beside
from latentdiff.data.variants import Size, Variant
from latentdiff.editing.masks import open_mask
from latentdiff.errors import UserError
from latentdiff.pictures import open_alpha, to_uint8

ALPHA = "alpha"


class LossMasks:
    """The mask of every picture in each of its variants, as shares of each latent's pixels.

    Args:
        examples: the pictures to learn.
        buckets: height and width that each is trained at.
        variants: how each fills its bucket.
        source: "alpha", what is opaque counts; or a field of the metadata that names a file, whose
            white counts.
        root: the folder of the data, in which these files lie.
        factor: pixels per latent, along a side.

    Raises:
        UserError: a mask cannot be read, or nothing of a picture counts.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        buckets: Sequence[Size],
        variants: Sequence[Variant],
        source: str,
        root: Path,
        factor: int,
    ) -> None:
        self.masks: list[list[Tensor] | None] = []
        for example, bucket in zip(examples, buckets, strict=True):
            if source == ALPHA:
                image = _alpha(example)
            else:
                image = open_mask(path_beside(example, source, root, "mask"))
            if image is None:
                self.masks.append(None)
                continue
            shares: list[Tensor] = []
            for variant in variants:
                pixels = to_uint8(variant.fill(image.convert("RGB"), bucket))[:1].float() / 255
                shares.append(avg_pool2d(pixels, factor))
                if not shares[-1].any():
                    raise UserError(f"{example.name}: nothing of it counts by its mask")
            self.masks.append(shares)

    def of(self, chosen: Sequence[tuple[int, int]], shape: torch.Size) -> Tensor:
        """Masks of these pictures and variants [B, 1, h, w]; ones for pictures that have none.

        Args:
            shape: of the latents, [B, C, h, w].
        """
        whole = torch.ones(1, *shape[2:])
        rows = [self.masks[n] if n < len(self.masks) else None for n, _ in chosen]
        return torch.stack(
            [whole if own is None else own[v] for own, (_, v) in zip(rows, chosen, strict=True)]
        )


def _alpha(example: Example) -> Image.Image | None:
    whole = example.span is None and example.cell is None
    return open_alpha(example.path if whole else example.read())

"""Control pictures of a training run: made out of its pictures, or read from beside them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from latentdiff.data.examples import Example
from latentdiff.data.listing import path_beside
from latentdiff.data.variants import Size, Variant
from latentdiff.editing.control_pictures import control_picture
from latentdiff.learning.finetune_config import ControlConfig
from latentdiff.pictures import open_picture, to_pil, to_uint8


class ControlPictures:
    """The control picture of every training picture in each of its variants, 3 bytes a pixel.

    Args:
        examples: the training pictures.
        buckets: height and width that each is trained at.
        variants: how each fills its bucket.
        config: how control pictures are made, or the field that names their files.
        root: the folder of the data, in which these files lie.

    Raises:
        UserError: a picture cannot be read, or a field names none of this folder.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        buckets: Sequence[Size],
        variants: Sequence[Variant],
        config: ControlConfig,
        root: Path,
    ) -> None:
        self.pictures: list[list[Tensor]] = []
        for example, bucket in zip(examples, buckets, strict=True):
            field = config.field
            path = field and path_beside(example, field, root, "control picture")
            image = open_picture(path) if path else example.open()
            filled = [variant.fill(image, bucket) for variant in variants]
            if config.field is None:
                filled = [control_picture(one, config.kind) for one in filled]
            self.pictures.append([to_uint8(one) for one in filled])

    def of(self, chosen: Sequence[tuple[int, int]]) -> Tensor:
        """Control pictures [B, 3, H, W] in [0, 1] of these pictures and variants."""
        pictures = [self.pictures[number][variant] for number, variant in chosen]
        return torch.stack(pictures).float() / 255

    def shown(self, number: int) -> Image.Image:
        """The control picture of a picture, to draw with."""
        return to_pil(self.of([(number, 0)])[0] * 2 - 1)

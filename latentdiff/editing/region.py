"""The part of a large picture around its hole, at the size of a model; and pictures made larger."""

from dataclasses import dataclass
from typing import Self

from PIL import Image, ImageOps

from latentdiff.editing.masks import (
    hole_of,
    mask_for,
    mask_like,
    mask_tensor,
    paste,
    resize_mask,
)
from latentdiff.errors import UserError
from latentdiff.pictures import Picture, open_picture, to_pil, to_tensor

_MOST_FEATHER = 24  # pixels


@dataclass(frozen=True, eq=False)
class Region:
    """A part of a picture to paint in, in place of the whole, which may be far too large.

        region = Region.around("photo.jpg", "mask.png", pipe.bundle.size)
        painted = pipe("a cat", edits=[RePaint(region.image, region.mask)]).images[0]
        region.paste(painted).save("with-a-cat.png")

    Attributes:
        picture: all of it.
        whole_mask: its mask.
        box: left, upper, right and lower edge of the part in the picture.
        image: the part at the size to work at.
        mask: its mask.
    """

    picture: Image.Image
    whole_mask: Image.Image
    box: tuple[int, int, int, int]
    image: Image.Image
    mask: Image.Image

    @classmethod
    def around(
        cls,
        picture: Picture,
        mask: Picture | None,
        size: tuple[int, int],
        margin: float = 0.5,
    ) -> Self:
        """The part around a hole.

        Args:
            picture: any picture.
            mask: what to paint, white, a picture of the same size; None for what is transparent.
            size: height and width of the model's pictures. The part has their shape where it fits
                into the picture, and is made as large, be it smaller or larger in the picture.
            margin: the least that is seen beside the hole, as a share of its longer side, >= 0.

        Raises:
            UserError: no picture, no hole, or a mask of another size.
        """
        if not 0 <= margin <= 100:
            raise UserError(f"margin must lie between 0 and 100, not {margin}.")
        hole = mask_for(picture, mask)
        image = open_picture(picture)
        hole = mask_like(hole, image)
        edges = hole_of(hole).getbbox()
        if edges is None:
            raise UserError("the mask has no hole: mark in white what is to be painted.")
        box = _box(edges, image.size, size, margin)
        scale = min(size[0] / (box[3] - box[1]), size[1] / (box[2] - box[0]))
        small = max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale))
        part = image.crop(box).resize(small, Image.Resampling.LANCZOS)
        return cls(image, hole, box, part, resize_mask(hole.crop(box), small))

    def paste(self, painted: Image.Image) -> Image.Image:
        """All of the picture with the painted part in its hole; the rest stays, bit for bit.

        Args:
            painted: what was drawn of `image`.
        """
        width, height = self.box[2] - self.box[0], self.box[3] - self.box[1]
        large = painted.resize((width, height), Image.Resampling.LANCZOS)
        known, mask = self.picture.crop(self.box), self.whole_mask.crop(self.box)
        feather = min(max(1, round(4 * width / painted.width)), _MOST_FEATHER)
        joined = paste(to_tensor(large)[None], to_tensor(known)[None], mask_tensor(mask), feather)
        result = self.picture.copy()
        hole = hole_of(mask)
        result.paste(to_pil(joined[0]), self.box, hole)
        return result


def _box(
    hole: tuple[int, int, int, int],
    picture: tuple[int, int],
    size: tuple[int, int],
    margin: float,
) -> tuple[int, int, int, int]:
    """A box around the hole with its margin, as near as may be to the shape of `size`."""
    left, top, right, bottom = hole
    wide = size[1] / size[0]
    beside = 2 * margin * max(right - left, bottom - top)
    width = max(right - left + beside, (bottom - top + beside) * wide)
    x0, x1 = _span(left, right, width, picture[0])
    y0, y1 = _span(top, bottom, width / wide, picture[1])
    return x0, y0, x1, y1


def _span(start: int, end: int, length: float, whole: int) -> tuple[int, int]:
    """About `length` pixels of a side of `whole`, as far around those of the hole as may be."""
    pixels = max(min(round(length), whole), end - start)
    first = min(max(round((start + end - pixels) / 2), 0), whole - pixels)
    return first, first + pixels


def extended(
    picture: Picture, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """A picture with more room around it, and the mask of that room: outpainting.

    Args:
        picture: any picture.
        left, top, right, bottom: pixels to add on each side, >= 0.

    Raises:
        UserError: no picture, or nothing is added.
    """
    image = open_picture(picture)
    border = left, top, right, bottom
    if min(border) < 0 or max(border) == 0:
        raise UserError("name pixels to add on at least one side, none below 0.")
    mask = ImageOps.expand(Image.new("L", image.size, 0), border, 255)
    return ImageOps.expand(image, border, "white"), mask


def read_extension(text: str) -> dict[str, int]:
    """Read "left=64,top=32" for `extended`.

    Raises:
        UserError: it is no such text.
    """
    sides: dict[str, int] = {}
    for part in text.replace(" ", "").split(","):
        name, equals, number = part.partition("=")
        known = name in ("left", "top", "right", "bottom") and name not in sides
        if not (known and equals and number.isdecimal() and int(number) <= 4096):
            raise UserError(f"--extend reads left=64,top=32,right=0,bottom=0, not {text!r:.60}.")
        sides[name] = int(number)
    return sides

"""A picture, a hole in it, and an edit of each kind, for what must compose with all of them."""

from typing import Any

from PIL import Image, ImageDraw
from tiny import noise_picture

from latentdiff import ILVR, RePaint, SDEdit

SIZE = (15, 13)  # no multiples of the factor
SOLVERS = ("ddim", "euler-a", "heun", "dpmpp-2m", "unipc", "ddpm")


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    return noise_picture(seed, size)


def hole() -> Image.Image:
    mask = Image.new("L", SIZE, 0)
    ImageDraw.Draw(mask).rectangle((5, 4, 11, 9), fill=255)
    return mask


EDITS: dict[str, list[Any]] = {
    "none": [],
    "SDEdit": [SDEdit(picture(0), 0.7, mask=hole())],
    "RePaint": [RePaint(picture(0), hole(), jump_length=1, resamples=2)],
    "ILVR": [ILVR(picture(0), factor=2)],
}

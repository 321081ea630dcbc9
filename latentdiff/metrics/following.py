"""Does a picture show what its prompt says? Measured by the truth that compositions are made by.

Colours by name inside the thing's mask, counts by connected parts, things by the nearest shape in
grey among real pictures. No network is asked, so what is trained by one cannot please it.
"""

from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image

from latentdiff.data.colours import dominant
from latentdiff.data.cutouts import box, parts, thing_mask

_SIDE = 24
_WHITE = 240  # a drawn white is not as even as a real one
_SPECK = 0.03  # parts smaller than this share of the largest are no things
_COUNTED = 0.2


def mask_of(picture: np.ndarray) -> np.ndarray:
    """Mask of the things in a drawn picture: uint8 [H, W, 3] -> bool [H, W], without specks."""
    mask = thing_mask(picture, _WHITE)
    if not mask.any():
        return mask
    return np.logical_or.reduce(parts(mask, _SPECK))


def colour_of(picture: np.ndarray) -> str:
    """The name of the dominant colour of what is on white; "white" if nothing is."""
    return dominant(picture, mask_of(picture))[0]


def count_of(picture: np.ndarray) -> int:
    """Count the connected things of comparable size on white."""
    mask = thing_mask(picture, _WHITE)
    return len(parts(mask, _COUNTED)) if mask.any() else 0


def things_of(picture: np.ndarray, most: int) -> list[np.ndarray]:
    """The masks of the largest connected things, at most so many, the largest first."""
    mask = thing_mask(picture, _WHITE)
    return parts(mask, _SPECK)[:most] if mask.any() else []


def shape(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A thing's outline and shading, whatever its size, place and colour: float32 [2 * 24 * 24].

    Cut out, centred in a square, reduced. Grey levels inside have mean 0 and deviation 1, so that
    a thing painted dark is near itself painted light.
    """
    if not mask.any():
        return np.zeros(2 * _SIDE * _SIDE, np.float32)
    left, top, right, bottom = box(mask)
    side = max(right - left, bottom - top)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    frame = (x, y, x + side, y + side)
    outline = _reduced(mask.astype(np.float32), frame)
    grey = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    inside = grey[mask]
    even = np.where(mask, (grey - inside.mean()) / (inside.std() + 8.0), 0.0)
    shading = _reduced(even.astype(np.float32).clip(-2.5, 2.5), frame)
    return np.concatenate([outline.ravel(), 0.35 * shading.ravel()])


def _reduced(values: np.ndarray, frame: tuple[float, float, float, float]) -> np.ndarray:
    """The part of a field [H, W] in a square frame that may overhang, as 24 x 24."""
    side = max(values.shape)
    wide = np.pad(values, side)
    moved = (frame[0] + side, frame[1] + side, frame[2] + side, frame[3] + side)
    image = Image.fromarray(wide.astype(np.float32), "F")
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX, moved))


class Shapes:
    """The shapes of real pictures, each with the emoji it is of.

    Args:
        pictures: uint8 [N, H, W, 3] on white.
        alphas: their transparency, uint8 [N, H, W].
        bases: which emoji each is of.
    """

    def __init__(self, pictures: np.ndarray, alphas: np.ndarray, bases: Sequence[str]) -> None:
        found = [shape(p, a > 127) for p, a in zip(pictures, alphas, strict=True)]
        self.table = np.stack(found)
        self.bases = list(bases)

    def nearest(self, wanted: np.ndarray) -> str:
        """The emoji whose shape is nearest to one, [2 * 24 * 24]."""
        return self.bases[int(np.square(self.table - wanted).sum(1).argmin())]

    def shows(self, picture: np.ndarray, bases: Collection[str]) -> bool:
        """Tell whether all of what is on white has a shape nearest to one of these emoji's."""
        return self.nearest(shape(picture, mask_of(picture))) in bases

    def shows_both(
        self, picture: np.ndarray, first: Collection[str], second: Collection[str], down: bool
    ) -> bool:
        """Tell whether the largest parts show the first (left, or upper if `down`) and the second.

        Pictures of more or fewer things of comparable size are wrong.
        """
        if count_of(picture) != 2:
            return False
        found = sorted(things_of(picture, 2), key=lambda mask: box(mask)[1 if down else 0])
        near = [self.nearest(shape(picture, mask)) for mask in found]
        return near[0] in first and near[1] in second

"""Colours by name: which one a picture shows, and how to give a thing another."""

import colorsys
from functools import cache

import numpy as np

NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
         "gray")  # fmt: skip
OTHER = len(NAMES)
"""The number of what has no name: between colours, or too pale for one."""

PAINTS: dict[str, tuple[int, int, int]] = {
    "red": (218, 42, 46), "orange": (246, 138, 28), "yellow": (250, 206, 52),
    "green": (66, 160, 62), "blue": (48, 112, 222), "purple": (132, 72, 192),
    "pink": (246, 122, 178), "brown": (124, 76, 46), "black": (44, 44, 48), "gray": (142, 146, 152),
}  # fmt: skip
"""The paints of things. White is left out: pictures are on white."""

# What a shaded thing of a colour also has: (dominant colour) -> colours that change with it.
_KIN: dict[str, tuple[str, ...]] = {
    "red": ("red", "pink"),
    "orange": ("orange", "yellow", "brown"),
    "yellow": ("yellow", "orange"),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "pink"),
    "pink": ("pink", "red", "purple"),
    "brown": ("brown", "orange"),
    "black": ("black", "gray"),
    "white": ("white", "gray"),
    "gray": ("gray", "white"),
}
_HUES = ((13, "red"), (40, "orange"), (67, "yellow"), (168, "green"), (257, "blue"),
         (296, "purple"), (346, "pink"), (361, "red"))  # fmt: skip


def _name_of(red: float, green: float, blue: float) -> int:
    """The number of the name of a colour with parts in [0, 1]."""
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    degrees = hue * 360
    chroma = saturation * value
    if value < 0.24 or (value < 0.32 and chroma < 0.1):
        return NAMES.index("black")
    if chroma < 0.1 or saturation < 0.13:
        return NAMES.index("white" if value > 0.87 else "gray")
    name = next(name for end, name in _HUES if degrees < end)
    if name == "red" and saturation < 0.58 and value > 0.75:
        name = "pink"
    elif name == "pink" and value < 0.55:
        name = "purple"
    elif name in ("orange", "yellow") and saturation < 0.4 and value > 0.6:
        return OTHER
    elif (name in ("red", "orange") and degrees > 8 and value < 0.7 and degrees < 60) or (
        name == "yellow" and value < 0.62
    ):
        name = "brown"
    return NAMES.index(name)


@cache
def _table() -> np.ndarray:
    """The number of the colour name of each 5-bit RGB, uint8 [32768]."""
    level = (np.arange(32) + 0.5) / 32
    return np.array([_name_of(r, g, b) for r in level for g in level for b in level], np.uint8)


def named(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> the number of each pixel's colour name, uint8 [H, W]."""
    five = (picture >> 3).astype(np.intp)
    return _table()[(five[..., 0] << 10) | (five[..., 1] << 5) | five[..., 2]]


def dominant(picture: np.ndarray, mask: np.ndarray) -> tuple[str, float]:
    """The colour that takes most of a thing, with its kin counted in part, and its share.

    Dark lines and white lights belong to things of every colour: black, white and gray win only
    if nothing coloured takes a quarter.

    Args:
        picture: uint8 [H, W, 3].
        mask: bool [H, W], where the thing is.
    """
    counts = np.bincount(named(picture)[mask], minlength=len(NAMES) + 1)[: len(NAMES)]
    shares = counts / max(1, int(mask.sum()))
    coloured = shares[:8]
    best = int(coloured.argmax()) if coloured.max() >= 0.25 else int(shares.argmax())
    return NAMES[best], float(shares[best])


def region(picture: np.ndarray, mask: np.ndarray, colour: str) -> np.ndarray:
    """Mask of the pixels of a thing that have a colour or one akin to it: bool [H, W]."""
    kin = np.zeros(len(NAMES) + 1, bool)
    kin[[NAMES.index(name) for name in _KIN[colour]]] = True
    return kin[named(picture)] & mask


def paint(
    picture: np.ndarray, where: np.ndarray, colour: str, jitter: np.ndarray | None = None
) -> np.ndarray:
    """Give a region another colour and keep its shading.

    The region's median lightness becomes the paint; what is darker goes to black, what is lighter
    to white.

    Args:
        picture: uint8 [H, W, 3].
        where: bool [H, W].
        jitter: factors [3] of the paint, about 1.
    """
    wide = picture.astype(np.float32)
    light = wide @ np.array([0.299, 0.587, 0.114], np.float32)
    middle = float(np.median(light[where]))
    target = np.array(PAINTS[colour], np.float32)
    if jitter is not None:
        target = np.minimum(target * jitter.astype(np.float32), 255)
    down = np.minimum(light / max(middle, 1.0), 1.0)
    up = np.clip((light - middle) / max(255.0 - middle, 1.0), 0.0, 1.0)
    up *= 0.35 if colour == "black" else 0.8
    new = target * down[..., None]
    new += (255 - new) * up[..., None]
    weight = _softened(where)[..., None]
    return (wide + weight * (new - wide) + 0.5).astype(np.uint8)


def _softened(mask: np.ndarray) -> np.ndarray:
    """A bool mask [H, W] as float32 with edges of three pixels."""
    wide = np.pad(mask.astype(np.float32), 1)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    return np.maximum(mask, (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9).astype(np.float32)

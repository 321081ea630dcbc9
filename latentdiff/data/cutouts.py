"""Cut the thing out of a picture on white: its mask, its transparency, its parts."""

import numpy as np

_WHITE = 249  # all channels above it: may be background
_EDGE = 56.0  # levels below white at which an edge pixel is opaque


def _spread(reached: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Find what of `free` the reached pixels reach along rows, all bool [H, W]."""
    runs = np.cumsum(~free.ravel()).reshape(free.shape) + np.arange(free.shape[0])[:, None]
    hit = np.bincount(runs.ravel(), weights=reached.ravel(), minlength=int(runs[-1, -1]) + 1) > 0
    return hit[runs] & free


def flood(start: np.ndarray, free: np.ndarray) -> np.ndarray:
    """All of `free` that is joined to `start` through edges of pixels; bool [H, W] each."""
    reached = start & free
    count = -1
    while (now := int(reached.sum())) != count:
        count = now
        reached = _spread(reached, free)
        reached = _spread(reached.T, free.T).T
    return reached


def thing_mask(picture: np.ndarray, white: int = _WHITE) -> np.ndarray:
    """All but the white that is joined to the border: uint8 [H, W, 3] -> bool [H, W]."""
    free = np.asarray((picture > white).all(-1))
    border = np.zeros_like(free)
    border[[0, -1], :] = border[:, [0, -1]] = True
    return ~flood(border, free)


def transparency(picture: np.ndarray) -> np.ndarray:
    """The alpha channel that a picture on white may have had: uint8 [H, W].

    Pixels at the thing's edge let through as much white as they are near to it.
    """
    mask = thing_mask(picture)
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    depth = np.clip((255.0 - picture.min(-1)) / _EDGE, 0.0, 1.0)
    return (255 * np.where(inner, 1.0, np.where(mask, depth, 0.0))).astype(np.uint8)


def parts(mask: np.ndarray, least: float = 0.0) -> list[np.ndarray]:
    """The connected parts of a mask [H, W], the largest first.

    Args:
        least: parts smaller than this share of the largest are left out.
    """
    rest = mask.copy()
    found: list[np.ndarray] = []
    while rest.any():
        start = np.zeros_like(rest)
        start.ravel()[rest.ravel().argmax()] = True
        part = flood(start, rest)
        rest &= ~part
        found.append(part)
    found.sort(key=lambda part: -int(part.sum()))
    return [part for part in found if part.sum() >= least * found[0].sum()]


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, upper, right, lower edge of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

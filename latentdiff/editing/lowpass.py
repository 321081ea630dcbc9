"""ILVR's low-pass filter, an antialiased cubic down and up again, and an enlargement that agrees
with the picture it is of, both as two small matrices."""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def low_pass(x: Tensor, factor: int) -> Tensor:
    """Low-pass filter x: resize it down by `factor` and back up again.

    phi_N of Choi et al. 2021 (ILVR), section 3.1: both ways with the cubic of Keys 1981, a = -0.5,
    stretched by the factor on the way down so that nothing aliases, and mirrored at the edges.

    Args:
        x: [B, C, H, W].
        factor: N >= 1; a side of n pixels becomes ceil(n / N).
    """
    rows, columns = (torch.from_numpy(low_pass_matrix(side, factor)).to(x) for side in x.shape[-2:])
    return rows @ x @ columns.T


def projection(x: Tensor, factor: int) -> Tensor:
    """The low pass made idempotent: x + projection(y - x) is, made smaller, exactly y made smaller.

    With D down and U up, low_pass is U D, and this is U (D U)^-1 D. Args: see `low_pass`.
    """
    rows, columns = (
        torch.from_numpy(projection_matrix(side, factor)).to(x) for side in x.shape[-2:]
    )
    return rows @ x @ columns.T


def agreeing(large: Tensor, small: Tensor) -> Tensor:
    """The nearest to `large` that, made smaller by Lanczos's filter, is `small`.

    The back-projection x + U (y - D x), with D Pillow's Lanczos filter and U = D^T (D D^T)^-1, so
    that one step is enough: D of the result is y, before it is clamped and rounded.

    Args:
        large: x [B, C, H, W].
        small: y [1 or B, C, h, w], with h <= H and w <= W.
    """
    heights = small.shape[-2], large.shape[-2]
    widths = small.shape[-1], large.shape[-1]
    rows, columns = (
        torch.from_numpy(lanczos_matrix(one[1], one[0])).to(large) for one in (heights, widths)
    )
    back_rows, back_columns = (
        torch.from_numpy(lanczos_inverse(one[1], one[0])).to(large) for one in (heights, widths)
    )
    lacking = small - rows @ large @ columns.T
    return large + back_rows @ lacking @ back_columns.T


def enlarged(small: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture [B, C, h, w] at a larger height and width, by Lanczos's filter as Pillow does it.

    Nothing is clamped: it may go beyond the range of the picture.
    """
    rows, columns = (
        torch.from_numpy(lanczos_matrix(before, after)).to(small)
        for before, after in zip(small.shape[-2:], size, strict=True)
    )
    return rows @ small @ columns.T


@lru_cache(maxsize=8)
def lanczos_inverse(before: int, after: int) -> NDArray[np.floating]:
    """[before, after], U with D U = 1: see `agreeing`."""
    down = lanczos_matrix(before, after)
    return np.linalg.solve(down @ down.T, down).T


@lru_cache(maxsize=8)
def lanczos_matrix(before: int, after: int) -> NDArray[np.floating]:
    """[after, before]: Pillow's antialiased Lanczos filter along one axis (Turkowski 1990).

    The kernel is sinc(x) sinc(x / 3), stretched by before / after; what of it lies beyond the edges
    is left out, and every row sums to 1.
    """
    scale = before / after
    stretch = max(scale, 1.0)
    centres = (np.arange(after) + 0.5) * scale - 0.5
    distance = (np.arange(before) - centres[:, None]) / stretch
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0.0)
    return weights / weights.sum(1, keepdims=True)


@lru_cache(maxsize=8)
def low_pass_matrix(side: int, factor: int) -> NDArray[np.floating]:
    """[side, side], down and up along one axis."""
    small = -(-side // factor)
    return resize_matrix(small, side) @ resize_matrix(side, small)


@lru_cache(maxsize=8)
def projection_matrix(side: int, factor: int) -> NDArray[np.floating]:
    """[side, side], see `projection`. The eigenvalues of D U are about 0.5 or more."""
    small = -(-side // factor)
    up, down = resize_matrix(small, side), resize_matrix(side, small)
    return up @ np.linalg.solve(down @ up, down)


def resize_matrix(before: int, after: int) -> NDArray[np.floating]:
    """[after, before]: resampling along one axis; every row sums to 1."""
    scale = before / after
    stretch = max(scale, 1.0)
    centres = (np.arange(after) + 0.5) * scale - 0.5
    reach = int(np.ceil(2 * stretch)) + 1
    taps = np.floor(centres)[:, None].astype(int) + np.arange(-reach, reach + 1)
    weights = keys_cubic((centres[:, None] - taps) / stretch)
    weights /= weights.sum(1, keepdims=True)
    period = taps % (2 * before)  # the mirror image follows, edge pixel repeated
    mirrored = np.minimum(period, 2 * before - 1 - period)
    matrix = np.zeros((after, before))
    np.add.at(matrix, (np.arange(after)[:, None], mirrored), weights)
    return matrix


def keys_cubic(distance: NDArray[np.floating], a: float = -0.5) -> NDArray[np.floating]:
    """Keys 1981 (Cubic Convolution Interpolation), eq. 15 with a = -1/2."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))

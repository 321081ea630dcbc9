"""Agreement of the edges of two pictures."""

import math

from torch import Tensor
from torch.nn.functional import max_pool2d


def customary_tolerance(height: int, width: int) -> int:
    """Whole pixels in 0.0075 of the diagonal, by which boundaries are compared: Martin et al. 2004.

    At 64 x 64 pixels it is 0: an edge must be in its very pixel. At 512 x 512 it is 5.
    """
    return int(0.0075 * math.hypot(height, width))


def edge_agreement(found: Tensor, wanted: Tensor, tolerance: int | None = None) -> float:
    """F1 of edges, as boundaries are compared (Martin et al. 2004): the harmonic mean of the shares
    of each picture's edge pixels that have one of the other's within `tolerance` pixels.

    Args:
        found: bool [H, W].
        wanted: bool [H, W].
        tolerance: in pixels, along each side; None is `customary_tolerance`.

    Returns:
        0 .. 1; 1 where neither has an edge, 0 where one alone has.
    """
    if not found.any() and not wanted.any():
        return 1.0
    if tolerance is None:
        tolerance = customary_tolerance(*found.shape)
    precision, recall = _near(found, wanted, tolerance), _near(wanted, found, tolerance)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def _near(these: Tensor, those: Tensor, tolerance: int) -> float:
    """The share of these pixels that have one of those within the tolerance; 0 of none."""
    wide = max_pool2d(those[None].float(), 2 * tolerance + 1, 1, tolerance)[0] > 0
    return float((these & wide).sum() / these.sum().clamp(min=1))

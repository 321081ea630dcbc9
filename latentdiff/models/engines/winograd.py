"""3 x 3 convolutions in 4 products for 9: F(2 x 2, 3 x 3) of Lavin & Gray 2016.

"Fast Algorithms for Convolutional Neural Networks": Y = A' ((G g G') * (B' d B)) A of overlapping
tiles d of 4 x 4 pixels, whose products, summed over channels, are sixteen products of matrices.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

_CHANNELS = 256
_TILES = 512  # computed at once, so that they stay in the cache


def pays(settings: tuple[object, ...], kernel: Tensor, shape: torch.Size) -> bool:
    """True where it takes less time than a direct convolution: 0.62 to 0.78 of it, on a CPU with
    AVX-512.

    With fewer channels what is added costs more than products save; of small maps weights, which
    are 16 / 9 as large, are most of what is read. In bfloat16 sums would be rounded too much.

    Args:
        settings: padding, stride, dilation and groups.
        kernel: [O, C, h, w].
        shape: of the maps [B, C, H, W].
    """
    count, channels, height, width = shape
    return (
        settings == ((1, 1), (1, 1), (1, 1), 1)
        and kernel.dtype == torch.float32
        and kernel.shape[2:] == (3, 3)
        and min(kernel.shape[:2]) >= _CHANNELS
        and height % 2 == width % 2 == 0
        and 2 * count * height * width > channels
    )


def transformed(kernel: Tensor) -> Tensor:
    """G g G' of a kernel [O, C, 3, 3]: [16, C, O]."""
    outside, inside = kernel.shape[:2]
    weights = kernel.new_empty(4, 4, inside, outside)
    for first in range(0, outside, _CHANNELS):  # in float64, not all at once
        part = kernel[first : first + _CHANNELS].double()
        for axis in (2, 3):
            a, b, c = part.unbind(axis)
            part = torch.stack([a, (a + b + c) / 2, (a - b + c) / 2, c], axis)
        weights[..., first : first + _CHANNELS] = part.permute(2, 3, 1, 0)
    return weights.flatten(0, 1)


def winograd(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of maps.

    Args:
        x: [B, C, H, W], H and W even.
        weights: of `transformed`.
        bias: [O].

    Returns:
        [B, O, H, W], channels-last.
    """
    count, _, height, width = x.shape
    whole = pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    out = x.new_empty(count, height, width, weights.shape[2])
    rows = max(1, 2 * _TILES // (count * width))  # of tiles
    for first in range(0, height, 2 * rows):
        last = min(first + 2 * rows, height)
        _band(whole[:, first : last + 2], weights, out[:, first:last])
    if bias is not None:
        out += bias
    return out.permute(0, 3, 1, 2)


def _band(x: Tensor, weights: Tensor, out: Tensor) -> None:
    """Of x [B, H + 2, W + 2, C] the products into out [B, H, W, O]."""
    count, height, width, wide = out.shape
    shape = count, height // 2, width // 2
    tiles = x.new_empty(4, 4, *shape, x.shape[3])
    for row, above in enumerate(_differences(x, 1, height)):
        for column, tile in enumerate(_differences(above, 2, width)):
            tiles[row, column] = tile
    products = torch.bmm(tiles.view(16, -1, x.shape[3]), weights).view(4, 4, *shape, wide)
    for row, above in enumerate(_sums(products)):
        for column, pixels in enumerate(_sums(above)):
            out[:, row::2, column::2] = pixels


def _differences(x: Tensor, axis: int, length: int) -> tuple[Tensor, ...]:
    """B' along an axis of `length` + 2 places, one tile at every second."""
    index = [slice(None)] * x.ndim
    a, b, c, d = (x[(*index[:axis], slice(first, first + length, 2))] for first in range(4))
    return a - c, b + c, c - b, b - d


def _sums(products: Tensor) -> tuple[Tensor, Tensor]:
    """A' along the first axis."""
    a, b, c, d = products
    return a + b + c, b - c - d

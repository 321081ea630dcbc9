"""Control pictures made out of photos and drawings, without a network: what ControlNets see."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import conv2d, pad

from latentdiff.errors import UserError
from latentdiff.pictures import Picture, open_picture
from latentdiff.registry import check_name

_SOBEL = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
_BLUR = torch.tensor([2.0, 4, 5, 4, 2])
_TILE = 8  # pixels that one is made of, along a side
_PALETTE = 8  # blocks along the longer side


def names() -> list[str]:
    """Every name that `control_picture` knows."""
    return list(_KINDS)


def control_picture(image: Picture, kind: str) -> Image.Image:
    """The control picture of this kind, as large as the picture.

    Args:
        image: a photo or a drawing.
        kind: "canny", "scribble", "grey", "palette" or "tile"; or "picture", as it is.

    Raises:
        UserError: no picture, or an unknown kind.
    """
    check_kind(kind)
    return _KINDS[kind](open_picture(image))


def check_kind(kind: str) -> None:
    """Check that a control picture of this kind can be made.

    Raises:
        UserError: there is no such kind.
    """
    check_name("control picture", kind, _KINDS)


def edges(image: Image.Image, low: float = 100.0, high: float = 200.0) -> Tensor:
    """Edges by Canny 1986: a blur, Sobel's gradient, its crests, and hysteresis.

    The gradient is that of the colour that changes most. Crests above `high` are edges, and those
    above `low` that touch them, directly or by way of others.

    Args:
        image: RGB.
        low: gradient, as OpenCV measures it (L1, of values in 0 .. 255).
        high: likewise.

    Returns:
        bool [H, W].

    Raises:
        UserError: not 0 <= low <= high.
    """
    if not 0 <= low <= high:
        raise UserError(f"canny: 0 <= low <= high, not {low} and {high}.")
    colours = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[:, None]
    blur = torch.outer(_BLUR, _BLUR) / _BLUR.sum() ** 2
    smooth = conv2d(pad(colours, (2, 2, 2, 2), "replicate"), blur[None, None])
    kernels = torch.stack([_SOBEL, _SOBEL.T])[:, None]
    gradients = conv2d(pad(smooth, (1, 1, 1, 1), "replicate"), kernels)  # [3, 2, H, W]
    strongest = gradients.abs().sum(1).argmax(0)
    across, down = gradients.gather(0, strongest.expand(1, 2, *strongest.shape))[0]
    size = across.abs() + down.abs()
    return _hysteresis(_crests(size, across, down), size, low, high)


def _crests(size: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Mark the pixels whose gradient is the largest along its direction, to an eighth of a turn."""
    around = pad(size[None, None], (1, 1, 1, 1))[0, 0]
    height, width = size.shape

    def beside(y: int, x: int) -> Tensor:
        return around[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    slope = down.abs() / across.abs().clamp(min=1e-9)
    level, steep = slope < np.tan(np.pi / 8), slope > np.tan(3 * np.pi / 8)
    same = (across * down) > 0
    before = torch.where(level, beside(0, -1), beside(-1, 0))
    after = torch.where(level, beside(0, 1), beside(1, 0))
    slant = ~level & ~steep
    before = torch.where(slant, torch.where(same, beside(-1, -1), beside(-1, 1)), before)
    after = torch.where(slant, torch.where(same, beside(1, 1), beside(1, -1)), after)
    return (size > before) & (size >= after)


def _hysteresis(crests: Tensor, size: Tensor, low: float, high: float) -> Tensor:
    """The crests above `high`, and those above `low` that a path of such crests joins to them.

    Each is visited once, so that no picture, however long its lines, takes long.
    """
    weak = np.pad((crests & (size > low)).numpy(), 1)
    found = np.pad((crests & (size > high)).numpy(), 1)
    width = weak.shape[1]
    around = np.array([dy * width + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    waiting, seen, front = weak.ravel(), found.ravel(), np.flatnonzero(found)
    while len(front):
        beside = np.unique(front[:, None] + around)
        front = beside[waiting[beside] & ~seen[beside]]
        seen[front] = True
    return torch.from_numpy(found[1:-1, 1:-1].copy())


def _canny(image: Image.Image) -> Image.Image:
    return _lines(edges(image))


def _scribble(image: Image.Image) -> Image.Image:
    """Wide soft strokes of the large edges, as a hand draws them."""
    soft = image.filter(ImageFilter.GaussianBlur(max(image.size) / 128))
    lines = _lines(edges(soft, 40, 80)).filter(ImageFilter.MaxFilter(3))
    return lines.filter(ImageFilter.GaussianBlur(0.5)).point(
        [255 * (value > 127) for value in range(256)] * 3
    )


def _lines(found: Tensor) -> Image.Image:
    """White on black."""
    return Image.fromarray(255 * found.numpy().astype(np.uint8)).convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _palette(image: Image.Image) -> Image.Image:
    """Mean colours of large blocks."""
    small = _shrunk(image, max(1, max(image.size) // _PALETTE))
    return small.resize(image.size, Image.Resampling.NEAREST)


def _tile(image: Image.Image) -> Image.Image:
    """Without its detail, which is to be drawn anew."""
    return _shrunk(image, _TILE).resize(image.size, Image.Resampling.BICUBIC)


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    """Means of blocks of about `side` pixels."""
    width, height = (max(1, round(length / side)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


_KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "canny": _canny,
    "scribble": _scribble,
    "grey": _grey,
    "palette": _palette,
    "tile": _tile,
    "picture": lambda image: image,
}

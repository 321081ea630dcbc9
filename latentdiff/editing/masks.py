"""Masks: 1 where a picture is painted anew, 0 where it is known and stays as it is.

One half decides: from there on a pixel is hole, hidden from the encoder and painted; below, it is
known and stays. So black that is not quite black makes no hole. Grey of the hole mixes what was
painted with what was there.
"""

import logging
import re

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, avg_pool2d, interpolate, max_pool2d, pad

from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError
from latentdiff.pictures import Picture, open_alpha, open_picture

_HOLE = 128  # of 255, the least that is hole
_CLEAR = 64  # of 255, from black and from white, what is clearly one or the other
_SWEEPS = 16  # of `extend` at each level: some per cent from harmonic in a hole of half a picture
_log = logging.getLogger(__name__)

_BOX = re.compile(",".join([r"(-?\d{1,9})"] * 4))


def box_mask(box: str, size: tuple[int, int]) -> Image.Image:
    """A mask that is white inside a box.

    Args:
        box: "x0,y0,x1,y1" in pixels from the top left; x1 and y1 are the first outside.
        size: width and height of the mask.

    Raises:
        UserError: it is no such text, or the box holds no pixel of the picture.
    """
    numbers = _BOX.fullmatch(box.replace(" ", ""))
    if numbers is None:
        raise UserError(f"a box is x0,y0,x1,y1 in whole pixels, not {box!r:.60}.")
    x0, y0, x1, y1 = map(int, numbers.groups())
    pixels = np.zeros((size[1], size[0]), dtype=np.uint8)
    pixels[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = 255
    if not pixels.any():
        raise UserError(f"the box {box} holds no pixel of a picture of {size[0]} x {size[1]}.")
    return Image.fromarray(pixels)


def open_mask(source: Picture) -> Image.Image:
    """Decodes a picture as a mask: 8-bit grey (mode L), what is transparent in it black.

    Raises:
        UserError: see `open_picture`.
    """
    return open_picture(source, background="black").convert("L")


def mask_like(mask: Image.Image, image: object) -> Image.Image:
    """Pass a mask that is as large as the opened picture it is for.

    One without a clear inside and outside is no drawn mask, and that is logged.

    Raises:
        UserError: it is not.
    """
    if isinstance(image, Image.Image):
        check_mask_size(mask, image.size)
    if isinstance(image, Tensor):
        raise UserError("latents need a mask tensor of their size, [1, 1, h, w], 1 where to paint.")
    _warn_if_unclear(mask)
    return mask


def check_mask_size(mask: Image.Image, size: tuple[int, int]) -> None:
    """Check that a mask is as large as its picture, of this width and height.

    Raises:
        UserError: it is not.
    """
    if mask.size != size:
        raise UserError(
            "the mask is {} x {} pixels, but the picture {} x {}.".format(*mask.size, *size)
        )


def _warn_if_unclear(mask: Image.Image) -> None:
    pixels = np.asarray(mask)
    low, high = pixels.min(), pixels.max()
    if high < _HOLE:
        _log.warning("the mask has no hole (its lightest grey is %d of 255): all is kept", high)
    elif low >= _HOLE:
        _log.warning("the mask is all hole (its darkest grey is %d of 255): all is painted", low)
    elif high < 255 - _CLEAR or low > _CLEAR:
        told = "the mask has no clear inside and outside (its greys are %d to %d of 255): 128 and "
        _log.warning(told + "more is painted, and mixed with the picture", low, high)


def mask_for(image: Picture, mask: Picture | None) -> Image.Image:
    """The one mask of a picture, in mode L: the given one, or where the picture is transparent.

    Raises:
        UserError: there is neither, or both and they differ.
    """
    alpha = open_alpha(image)
    holes = None if alpha is None else alpha.point(lambda value: 255 - value)
    if holes is not None and not _is_hole(holes).any():
        holes = None
    if mask is None:
        if holes is None:
            raise UserError("no part of the picture is transparent: give a mask (white: paint).")
        return holes
    given = open_mask(mask)
    if holes is None:
        return given
    if not np.array_equal(_is_hole(given), _is_hole(holes)):
        raise UserError(
            "the picture has transparent parts, and the mask is another: remove either of them."
        )
    return given


def resize_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask (mode L) at another width and height; the smallest hole is still there.

    A pixel of which any part was hole is hole; grey is averaged.
    """
    hole = torch.from_numpy(_is_hole(mask))[None].float()
    kept = adaptive_max_pool2d(hole, (size[1], size[0]))[0].byte() * _HOLE
    return ImageChops.lighter(
        mask.resize(size, Image.Resampling.BOX), Image.fromarray(kept.numpy())
    )


def hole_of(mask: Image.Image) -> Image.Image:
    """The hole of a mask (mode L), white on black."""
    return mask.point([0] * _HOLE + [255] * (256 - _HOLE))


def _is_hole(mask: Image.Image) -> np.ndarray:
    return np.asarray(mask) >= _HOLE


def mask_tensor(mask: Picture | Tensor | None) -> Tensor:
    """An opened mask as [1, 1, H, W] in [0, 1]; black is exactly 0, white exactly 1."""
    assert isinstance(mask, Image.Image)
    return torch.from_numpy(np.array(mask)).float()[None, None] / 255


def check_mask(mask: Tensor) -> None:
    """Pass a mask given as a tensor.

    Raises:
        UserError: it has not four dimensions, or not values in [0, 1].
    """
    if mask.ndim != 4:
        raise UserError(f"a mask must be [1 or B, 1 or C, h, w], not {list(mask.shape)}.")
    if not (mask.min() >= 0 and mask.max() <= 1):
        raise UserError("a mask must lie between 0 and 1.")


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """[1, 1, H, W] -> [1, 1, H / factor, W / factor] of 0 and 1.

    A latent is painted anew if any of its pixels is hole; so the smallest hole is there and no
    latent that is kept holds a pixel of the hole.
    """
    return (max_pool2d(mask, factor) >= 0.5).to(mask.dtype)


def masked_picture(picture: Tensor, mask: Tensor) -> Tensor:
    """A picture with its hole grey, as inpainting U-Nets are shown it.

    Args:
        picture: [B, 3, H, W] in [-1, 1].
        mask: [1 or B, 1, H, W] in [0, 1], the hole where it is 0.5 or more.
    """
    return picture * (mask < 0.5)


def inpainting_channels(mask: Tensor, masked: Tensor) -> Tensor:
    """Build the input channels of an inpainting U-Net that follow x_t, in Stable Diffusion's order.

    Rombach et al. 2022 (LDM), section 3.3: conditions concatenated to the input of the U-Net.

    Args:
        mask: [1 or B, 1, H, W] in [0, 1], in pixels or latents; the hole where it is 0.5 or more.
            It is resized to the latents by nearest neighbour, as diffusers does.
        masked: latents of `masked_picture` [B, C, h, w], scaled as x_0 is.

    Returns:
        [B, 1 + C, h, w] like `masked`: the mask of 0 and 1, then the latents.
    """
    hole = interpolate((mask >= 0.5).to(masked), size=masked.shape[-2:], mode="nearest")
    return torch.cat([hole.expand(len(masked), -1, -1, -1), masked], dim=1)


def composite(
    x: Tensor, image: Tensor, mask: Tensor, level: NoiseLevel, noise: NoiseStreams
) -> Tensor:
    """x with its known region put back at the level of x, under fresh noise.

    Lugmayr et al. 2022 (RePaint), eq. 8a and 8c, for any alpha and sigma.

    Args:
        x: [B, C, H, W] at `level`.
        image: clean, [1 or B, C, H, W].
        mask: [1 or B, 1 or C, H, W] in [0, 1], 1 where x stays.
        level: the noise level of x.
        noise: streams of B pictures. A picture of which nothing is known draws none.
    """
    held = (mask != 1).flatten(1).any(1).expand(len(x)).nonzero().flatten()
    if not len(held):
        return x
    rows = held.to(x.device)
    mask, image = (part.to(x).expand(len(x), -1, -1, -1)[rows] for part in (mask, image))
    known = level.alpha * image
    if level.sigma > 0:
        known = known + level.sigma * noise.only(held.tolist()).like(known)
    mixed = known + mask * (x[rows] - known)
    return x.index_copy(0, rows, torch.where(mask == 0, known, mixed))


def constrains_nothing(mask: Tensor) -> bool:
    """Tell whether the mask is 1 everywhere, so that the whole picture is repainted."""
    return bool((mask == 1).all())


def extend(values: Tensor, known: Tensor) -> Tensor:
    """Known values continued smoothly into the unknown: about the harmonic continuation.

    Where a value is unknown, it is the mean of its four neighbours (Perez et al. 2003, Poisson
    image editing, eq. 2 without a guide). Solved from coarse to fine, 2 x 2 pixels becoming one,
    with some sweeps at each level.

    Args:
        values: [B, C, H, W].
        known: [1 or B, 1, H, W] of 0 and 1.

    Returns:
        [B, C, H, W], unchanged where known; 0 if nothing is.
    """
    size = values.shape[-2:]
    if min(known.shape[-2:]) == 1 and max(known.shape[-2:]) == 1:
        return values * known
    weight = avg_pool2d(known, 2, ceil_mode=True, count_include_pad=False)
    mean = avg_pool2d(values * known, 2, ceil_mode=True, count_include_pad=False)
    mean = torch.where(weight > 0, mean / weight.clamp(min=1e-6), 0.0)
    coarse = extend(mean, (weight > 0).to(known.dtype))
    fine = interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    for _ in range(_SWEEPS):
        fine = torch.where(known > 0, values, _mean_of_neighbours(fine))
    return fine


def _mean_of_neighbours(x: Tensor) -> Tensor:
    """Average the four neighbours of each pixel, with replicated edges."""
    around = pad(x, (1, 1, 1, 1), mode="replicate")
    beside = around[..., 1:-1, :-2] + around[..., 1:-1, 2:]
    return (beside + around[..., :-2, 1:-1] + around[..., 2:, 1:-1]) / 4


def fill(picture: Tensor, mask: Tensor) -> Tensor:
    """A picture without what is in its hole, so that an encoder does not see it.

    Args:
        picture: [B, C, H, W].
        mask: [1, 1, H, W] in [0, 1], the hole where it is 0.5 or more.
    """
    return extend(picture, (mask < 0.5).to(picture.dtype))


def paste(painted: Tensor, picture: Tensor, mask: Tensor, feather: int) -> Tensor:
    """The known pixels put back exactly, and their step to the painted ones spread into the hole.

    What the painted picture lacks beside the border is continued into the hole and added, fading
    out over `feather` pixels. So the seam lies in the hole, and what was in it shows nowhere.

    Args:
        painted: [B, 3, H, W].
        picture: [1, 3, H, W]; where the mask is below 0.5 the result is this, bit for bit.
        mask: [1, 1, H, W] in [0, 1]; from 0.5 on the share of what was painted.
        feather: width of the seam in pixels, >= 1.
    """
    if constrains_nothing(mask):
        return painted
    picture, mask = picture.to(painted), mask.to(painted)
    known = (mask < 0.5).to(painted)
    lacking = extend(picture - painted, known)
    seamless = painted + _nearness(known, feather) * lacking
    return torch.where(mask < 0.5, picture, picture + mask * (seamless - picture))


def _nearness(known: Tensor, feather: int) -> Tensor:
    """1 where known, falling evenly to 0 over `feather` pixels into the hole."""
    near, total = known, torch.zeros_like(known)
    for _ in range(feather):  # each square is the one before, grown by a pixel
        near = max_pool2d(near, 3, 1, 1)
        total += near
    return total / feather

"""Fill a hole before the picture is encoded, and close its border in the end."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torch import Tensor

from latentdiff.editing import Blend, SDEdit
from latentdiff.editing.masks import (
    box_mask as drawn_box,
)
from latentdiff.editing.masks import (
    extend,
    fill,
    latent_mask,
    mask_for,
    mask_tensor,
    paste,
    resize_mask,
)
from latentdiff.errors import UserError


def plane(height: int = 48, width: int = 61) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((0.7 * x + 0.3 * y) / 60)[None, None]


def box_mask() -> Tensor:
    mask = torch.zeros(1, 1, 48, 61)
    mask[..., 10:34, 12:44] = 1
    return mask


def test_a_plane_is_continued_as_a_plane_and_the_hole_is_not_seen() -> None:
    """A plane is harmonic, so it is its own continuation."""
    mask = box_mask()
    hidden = torch.where(mask > 0, 99.0, plane())
    filled = fill(hidden, mask)
    assert torch.equal(filled[mask == 0], plane()[mask == 0])
    assert (filled - plane()).abs().max() < 0.02 * plane().max()
    for known in (torch.zeros(1, 1, 5, 7), torch.ones(1, 1, 5, 7)):
        assert torch.equal(extend(plane(5, 7), known), plane(5, 7) * known)


def test_an_edge_does_not_break_off_where_a_hole_begins() -> None:
    """Half black and half white, the right side hidden: next to the border it goes on as it was."""
    picture = torch.full((1, 1, 64, 64), -1.0)
    picture[..., :32, :] = 1
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    filled = fill(picture, mask)
    assert (filled[..., 33] - picture[..., 33])[..., :24].abs().max() < 0.2
    assert (filled[..., 33] - picture[..., 33])[..., 40:].abs().max() < 0.2


def test_pasting_leaves_the_known_exact_and_no_step_at_the_border() -> None:
    mask, picture = box_mask(), plane()
    painted = picture + 0.5 + 0.3 * torch.sin(torch.arange(61.0) / 6)  # a wrong level that drifts
    pasted = paste(painted, picture, mask, feather=8)
    assert torch.equal(pasted[mask == 0], picture[mask == 0])
    assert torch.equal(pasted[..., 20:24, 22:34], painted[..., 20:24, 22:34])  # beyond the feather
    for axis in (-1, -2):
        wrong = torch.where(mask > 0, painted, picture).diff(dim=axis).abs().max()
        assert pasted.diff(dim=axis).abs().max() < 0.3 * wrong


MASKS = arrays(np.uint8, st.tuples(st.integers(8, 24), st.integers(8, 24)))


def grey(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.astype(np.uint8))


@settings(deadline=None, max_examples=60)
@given(MASKS, st.integers(0, 127), st.integers(128, 255))
def test_nearly_black_is_black_and_nearly_white_is_white(
    pixels: np.ndarray, dark: int, light: int
) -> None:
    """A mask is decided at one half: black may be 1 of 255, or 127."""
    clean = mask_tensor(grey(np.where(pixels < 128, 0, 255)))
    dirty = mask_tensor(grey(np.where(pixels < 128, dark, light)))
    height, width = (side - side % 8 for side in pixels.shape)
    assert torch.equal(
        latent_mask(dirty[..., :height, :width], 8), latent_mask(clean[..., :height, :width], 8)
    )
    picture = torch.rand(1, 3, *pixels.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fill(picture, dirty), fill(picture, clean))
    kept = (clean == 0).expand_as(picture)
    assert torch.equal(paste(picture + 0.3, picture, dirty, 8)[kept], picture[kept])


def test_grey_of_the_hole_mixes_in_its_proportion() -> None:
    mask = box_mask()
    mask[..., 20:24, 22:34] = 0.75  # farther from the border than the seam reaches
    picture, painted = plane(), plane() + 0.5
    pasted = paste(painted, picture, mask, feather=2)
    mixed = picture + 0.75 * (painted - picture)
    torch.testing.assert_close(pasted[..., 20:24, 22:34], mixed[..., 20:24, 22:34])


def alpha(value: int, hole: int | None = None) -> Image.Image:
    image = Image.new("RGBA", (16, 16), (9, 9, 9, value))
    if hole is not None:
        image.paste((9, 9, 9, hole), (4, 4, 8, 8))
    return image


def test_nearly_opaque_is_opaque() -> None:
    """Alpha of 254 all over, as some programs save it, makes no hole."""
    for value in (254, 200, 128):
        with pytest.raises(UserError, match="no part of the picture is transparent"):
            mask_for(alpha(value), None)
        box = drawn_box("4,4,8,8", (16, 16))
        assert mask_for(alpha(value), box) == box
        holes = np.asarray(mask_for(alpha(value, hole=3), None)) >= 128
        assert np.array_equal(holes, np.asarray(box) >= 128)
        assert mask_for(alpha(value, hole=3), box) == box
    with pytest.raises(UserError, match="the mask is another"):
        mask_for(alpha(254, hole=3), drawn_box("4,4,9,8", (16, 16)))


@settings(deadline=None, max_examples=60)
@given(MASKS, st.integers(1, 30), st.integers(1, 30))
def test_a_resized_mask_keeps_the_smallest_hole(
    pixels: np.ndarray, width: int, height: int
) -> None:
    mask = grey(pixels)
    resized = np.asarray(resize_mask(mask, (width, height)))
    assert resized.shape == (height, width)
    high, wide = pixels.shape
    for y, x in zip(*np.nonzero(pixels >= 128), strict=True):
        assert resized[y * height // high, x * width // wide] >= 128
    if (pixels == 0).all():
        assert not resized.any()
    assert np.array_equal(np.asarray(resize_mask(mask, mask.size)), pixels)


@pytest.mark.parametrize("edit", [Blend, lambda image, mask: SDEdit(image, 0.5, mask=mask)])
@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0, 255, ""),
        (3, 250, ""),
        (0, 0, "has no hole (its lightest grey is 0 of 255): all is kept"),
        (1, 90, "has no hole (its lightest grey is 90 of 255): all is kept"),
        (255, 255, "is all hole (its darkest grey is 255 of 255): all is painted"),
        (100, 150, "no clear inside and outside (its greys are 100 to 150 of 255)"),
        (0, 140, "no clear inside and outside (its greys are 0 to 140 of 255)"),
    ],
)
def test_a_mask_without_a_clear_inside_and_outside_is_told(
    edit: Callable[[Image.Image, Image.Image], object],
    low: int,
    high: int,
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mask = grey(np.full((16, 16), low))
    mask.paste(high, (4, 4, 8, 8))
    if low == high:
        mask = grey(np.full((16, 16), low))
    with caplog.at_level(logging.WARNING):
        edit(Image.new("RGB", (16, 16)), mask)
    assert told in caplog.text
    assert len(caplog.records) == bool(told)

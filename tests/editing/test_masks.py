"""What lies in a hole before a picture is encoded, and how its border is closed in the end."""

import torch
from torch import Tensor

from latentdiff.editing.masks import extend, fill, paste


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

"""Regions: where the part around a hole lies, and that all beside the hole stays bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_bundle

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.cli import main
from latentdiff.editing import ILVR, Region, RePaint, SDEdit, box_mask, extended
from latentdiff.editing.region import read_extension
from latentdiff.pictures import open_picture


def photo(width: int, height: int) -> Image.Image:
    """A picture with detail at every scale, the same each time."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noise = random.integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 90), st.tuples(*[st.integers(0, 89)] * 4),
    st.sampled_from([(16, 16), (16, 24), (64, 32)]), st.floats(0, 3),
)  # fmt: skip
def test_the_part_holds_the_hole_and_nothing_else_changes(
    width: int, height: int, edges: tuple[int, int, int, int], size: tuple[int, int], margin: float
) -> None:
    x0, x1 = sorted((edges[0] % width, edges[1] % width))
    y0, y1 = sorted((edges[2] % height, edges[3] % height))
    picture = photo(width, height)
    mask = box_mask(f"{x0},{y0},{x1 + 1},{y1 + 1}", picture.size)
    region = Region.around(picture, mask, size, margin)
    left, upper, right, lower = region.box
    assert 0 <= left <= x0
    assert 0 <= upper <= y0
    assert x1 < right <= width
    assert y1 < lower <= height
    assert region.image.size == region.mask.size
    assert region.image.width <= size[1] and region.image.height <= size[0]  # noqa: PT018
    assert np.asarray(region.mask).max() >= 128
    pasted = np.asarray(region.paste(Image.new("RGB", region.image.size, "red")))
    outside = np.asarray(mask) < 128
    assert (pasted[outside] == np.asarray(picture)[outside]).all()


def test_what_was_not_changed_comes_back_as_it_was() -> None:
    """A smooth picture survives the way to the model's size and back; a seam would show."""
    smooth = photo(6, 5).resize((400, 300), Image.Resampling.BICUBIC)
    region = Region.around(smooth, box_mask("100,80,220,200", smooth.size), (64, 64))
    box = region.box
    assert box == (40, 20, 280, 260)  # 240 of 300 x 400: the hole, and half of it on each side
    back = np.asarray(region.paste(region.image)).astype(int)
    assert np.abs(back - np.asarray(smooth)).max() <= 6


def test_every_edit_works_on_a_part(tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    picture = photo(90, 70)
    mask = box_mask("50,40,75,60", picture.size)
    region = Region.around(picture, mask, pipe.bundle.size)
    edits = [
        [RePaint(region.image, region.mask, resamples=2)],
        [SDEdit(region.image, 0.6, mask=region.mask), ILVR(region.image)],
    ]
    results = [
        pipe("a cat", edits=each, num_inference_steps=3, seed=0, progress=False) for each in edits
    ]
    outside = np.asarray(mask) < 128
    for output in results:
        whole = np.asarray(region.paste(output.images[0]))
        assert whole.shape == (70, 90, 3)
        assert (whole[outside] == np.asarray(picture)[outside]).all()
        assert (whole[~outside] != np.asarray(picture)[~outside]).mean() > 0.5


def test_a_small_hole_in_a_large_picture_costs_what_a_plain_picture_costs() -> None:
    """As many calls of the network, on as many latents; all other pixels stay."""
    pipe = LatentDiffusionPipeline(tiny_bundle())
    picture = photo(1200, 900)
    mask = box_mask("700,300,790,390", picture.size)
    region = Region.around(picture, mask, pipe.bundle.size)
    run: dict[str, Any] = {"num_inference_steps": 3, "seed": 0, "progress": False}
    plain = pipe("a cat", **run)
    painted = pipe("a cat", edits=[RePaint(region.image, region.mask, resamples=1)], **run)
    assert painted.nfe == plain.nfe
    assert painted.latents.shape == plain.latents.shape
    changed = (np.asarray(region.paste(painted.images[0])) != np.asarray(picture)).any(-1)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (300, 389, 700, 789)


def test_the_command_paints_in_a_large_picture_and_beyond_its_borders(tmp_path: Path) -> None:
    model = tiny_bundle().save(tmp_path / "model")
    picture = photo(120, 80)
    picture.save(tmp_path / "photo.png")
    rest = ["a cat", "--steps", "2", "--resamples", "1", "--seed", "1", "--model", str(model)]
    out = ["-o", str(tmp_path / "out")]
    photo_path = str(tmp_path / "photo.png")
    box = ["--mask", "box:60,30,80,50", "--only-masked"]
    assert main(["inpaint", photo_path, *rest, *box, *out]) == 0
    whole = np.asarray(open_picture(tmp_path / "out/00000-1.png"))
    changed = (whole != np.asarray(picture)).any(-1)
    rows, columns = np.nonzero(changed)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (60, 79, 30, 49)
    assert main(["inpaint", photo_path, *rest, "--extend", "left=10", "--no-fit", *out]) == 0
    wide = np.asarray(open_picture(tmp_path / "out/00001-1.png"))
    assert wide.shape == (80, 130, 3)
    assert (wide[:, 10:] == np.asarray(picture)).all()
    assert main(["inpaint", photo_path, *rest, "--extend", "left=10", *box, *out]) == 2


def test_mistakes_are_one_line() -> None:
    with pytest.raises(UserError, match="no hole"):
        Region.around(photo(20, 20), Image.new("L", (20, 20)), (16, 16))
    with pytest.raises(UserError, match="margin"):
        Region.around(photo(20, 20), box_mask("0,0,5,5", (20, 20)), (16, 16), -1)
    with pytest.raises(UserError, match="at least one side"):
        extended(photo(4, 4))
    assert read_extension("left=64, top=3") == {"left": 64, "top": 3}
    for text in ("left", "left=-3", "left=1,left=2", "up=3", "left=99999", ""):
        with pytest.raises(UserError, match="--extend reads"):
            read_extension(text)

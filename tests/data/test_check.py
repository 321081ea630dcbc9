"""Faulty pictures, all found at once; how a picture fills a bucket."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentdiff.data.check import check_pictures
from latentdiff.data.folder import list_folder
from latentdiff.data.variants import Variant, bucket_sizes, nearest_bucket, variants

SIDES = st.integers(8, 90)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good pictures, and one of each fault."""
    rng = np.random.default_rng(0)
    for name in ("a", "b", "words", "cut"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    Image.open(tmp_path / "a.png").save(tmp_path / "twin.webp", lossless=True)
    Image.new("RGB", (40, 9)).save(tmp_path / "low.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    for path in list(tmp_path.iterdir()):
        if path.stem != "words":
            path.with_suffix(".txt").write_text(f"a {path.stem}\n")
    return tmp_path


def test_every_fault_is_named_and_the_others_stay(folder: Path) -> None:
    checked = check_pictures(list_folder(folder), 16, progress=False)
    assert [example.path.name for example in checked.examples] == ["a.png", "b.png"]
    assert checked.sizes == [(20, 30), (20, 30)]
    found = {(fault.example.path.name, fault.trouble) for fault in checked.faults}
    assert found == {
        ("cut.png", "broken"),
        ("low.png", "tiny"),
        ("twin.webp", "duplicate"),
        ("words.png", "captionless"),
    }
    for fault in checked.faults:
        assert fault.example.path.name in fault.line
    assert checked.summary() == "4 of 6 pictures (1 broken, 1 tiny, 1 duplicate, 1 captionless)"


def test_a_duplicate_without_words_is_told_as_both(folder: Path) -> None:
    (folder / "twin.txt").unlink()
    found = check_pictures(list_folder(folder), 16, progress=False).faults
    (twin,) = (fault.line for fault in found if fault.trouble == "duplicate")
    assert twin.endswith("twin.webp is a duplicate of " + f"{folder}/a.png, and has no caption")
    (folder / "twin.txt").write_bytes(b"\xff\xfe\x00")
    found = check_pictures(list_folder(folder), 16, progress=False).faults
    (twin,) = (fault.line for fault in found if fault.trouble == "duplicate")
    assert twin.endswith("a.png, and its words cannot be read")


def test_a_prompt_is_the_caption_of_all(folder: Path) -> None:
    checked = check_pictures(list_folder(folder), 1, prompt="a sks", progress=False)
    assert [example.path.name for example in checked.examples] == [
        "a.png",
        "b.png",
        "low.png",
        "words.png",
    ]
    assert {example.captions for example in checked.examples} == {("a sks",)}


@given(width=SIDES, height=SIDES, at=st.sampled_from([0.0, 0.3, 1.0]))
def test_filling_keeps_the_place_and_the_shape_of_things(
    width: int, height: int, at: float
) -> None:
    """Each channel is a ramp, so that a pixel's colour tells where in the picture it is from."""
    ys, xs = np.mgrid[:height, :width]
    ramps = np.stack([xs * 255 / width, ys * 255 / height, 0 * xs], -1).round().astype(np.uint8)
    image = Image.fromarray(ramps)
    filled = np.asarray(Variant(at).fill(image, (32, 16))).astype(float)
    assert filled.shape == (32, 16, 3)
    scale = max(16 / width, 32 / height)
    left, top = (width - 16 / scale) * at, (height - 32 / scale) * at
    assert filled[16, 8, 0] == pytest.approx((left + 8 / scale) * 255 / width, abs=256 / width + 4)
    assert filled[16, 8, 1] == pytest.approx(
        (top + 16 / scale) * 255 / height, abs=256 / height + 4
    )
    mirrored = np.asarray(Variant(at, flip=True).fill(image, (32, 16)))
    assert np.array_equal(mirrored[:, ::-1], filled)


def test_variants_are_all_crops_and_their_mirror_images() -> None:
    assert variants(1, False) == [Variant(0.5)]
    assert [v.across for v in variants(3, False)] == [0.0, 0.5, 1.0]
    names = {v.named((8, 8)) for v in variants(3, True)}
    assert len(names) == 6


@given(st.integers(2, 12), st.sampled_from([8, 16, 64]), SIDES, SIDES)
def test_buckets_have_about_the_area_and_sides_that_fit(n: int, unit: int, h: int, w: int) -> None:
    size = (n * unit, n * unit)
    buckets = bucket_sizes(size, unit)
    assert size in buckets
    for height, width in buckets:
        assert height % unit == width % unit == 0
        assert height * width <= size[0] ** 2 < height * (width + unit)
        assert 0.5 <= height / width <= 2
    chosen = nearest_bucket((h, w), buckets)
    ratio = lambda bucket: max(bucket[0] * w / (bucket[1] * h), bucket[1] * h / (bucket[0] * w))  # noqa: E731
    assert ratio(chosen) == min(map(ratio, buckets))

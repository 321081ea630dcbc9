"""The door for pictures: a zoo of files, properties of any file, and what is written to disk."""

import fcntl
import logging
import os
import resource
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from latentdiff.errors import UserError
from latentdiff.pictures import (
    centre_square,
    encode_png,
    grid,
    labelled,
    open_picture,
    save_numbered_png,
    save_png,
    to_pil,
    to_tensor,
)

ORANGE = (240, 130, 20)
SIZE = (24, 16)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(
    kind: int, depth: int, size: tuple[int, int], rows: bytes, extra: bytes = b"", lace: int = 0
) -> bytes:
    """A PNG put together by hand: what Pillow reads but does not write."""
    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, lace)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def flat(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, SIZE, colour)  # pyright: ignore[reportArgumentType]


def rgb() -> Image.Image:
    return flat("RGB", ORANGE)


def palette(**options: object) -> bytes:
    image = flat("P", 1)
    image.putpalette([0, 0, 0, *ORANGE])
    return encoded(image, "PNG", **options)


def frames(kind: str) -> bytes:
    more = [flat("RGB", "blue"), flat("RGB", "green")]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return encoded(rgb(), kind, save_all=True, append_images=more, duration=50, **lossless)


def with_broken_exif() -> bytes:
    return encoded(rgb(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff\xff\xff", quality=95)


def huge_jpeg() -> bytes:
    data = bytearray(encoded(rgb(), "JPEG"))
    at = data.index(b"\xff\xc0")  # SOF0: length, precision, height, width
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    return bytes(data)


def huge_webp(kind: bytes, body: bytes) -> bytes:
    riff = b"WEBP" + kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(riff)) + riff


def text_bomb() -> bytes:
    """A compressed comment that unfolds to 32 MiB."""
    return raw_png(
        2, 8, (1, 1), b"\0\1\2\3", chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**25)))
    )


def with_segment(jpeg: bytes, body: bytes) -> bytes:
    """A JPEG with an application segment of its own."""
    return jpeg[:2] + b"\xff\xed" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    data = encoded(rgb(), "JPEG", progressive=True)
    last = data[data.rindex(SCAN) : -2]
    return data[:-2] + count * last + data[-2:]


def huge_bmp() -> bytes:
    data = encoded(rgb(), "BMP")
    return data[:18] + struct.pack("<ii", 30000, 30000) + data[26:]


def run_length_bmp() -> bytes:
    data = bytearray(encoded(flat("P", 1), "BMP"))
    data[30:34] = struct.pack("<I", 1)  # BI_RLE8
    return bytes(data)


SCAN = b"\xff\xda"
EMPTY = b"\xff\xed\0\2"  # a segment
PIXEL = b"\0" + bytes(ORANGE)
RGB16 = b"".join(struct.pack(">H", value) for value in ORANGE)
BIG = b"monitor\0\0" + zlib.compress(np.random.default_rng(0).bytes(1_500_000))
BLACK, WHITE, GREY = (0, 0, 0), (255, 255, 255), (128, 128, 128)
ON_WHITE = tuple(round(c * 128 / 255 + 255 * 127 / 255) for c in ORANGE)  # alpha 128

GOOD: dict[str, tuple[Callable[[], bytes], tuple[int, ...]]] = {
    "png": (lambda: encoded(rgb(), "PNG"), ORANGE),
    "png, 1 bit": (lambda: encoded(flat("1", 1), "PNG"), WHITE),
    "png, grey": (lambda: encoded(flat("L", 128), "PNG"), GREY),
    "png, grey, transparent": (lambda: encoded(flat("L", 9), "PNG", transparency=9), WHITE),
    "png, LA": (lambda: encoded(flat("LA", (0, 128)), "PNG"), (127, 127, 127)),
    "png, palette": (palette, ORANGE),
    "png, palette, transparent": (lambda: palette(transparency=1), WHITE),
    "png, palette, alpha": (lambda: palette(transparency=bytes([255, 128])), ON_WHITE),
    "png, RGB, transparent": (lambda: encoded(rgb(), "PNG", transparency=ORANGE), WHITE),
    "png, RGBA": (lambda: encoded(flat("RGBA", (*ORANGE, 128)), "PNG"), ON_WHITE),
    "png, RGBA, clear": (lambda: encoded(flat("RGBA", (*ORANGE, 0)), "PNG"), WHITE),
    "png, 16-bit grey": (lambda: encoded(flat("I;16", 128 * 257), "PNG"), GREY),
    "png, 16-bit dark": (lambda: encoded(flat("I;16", 300), "PNG"), (1, 1, 1)),
    "png, 16-bit transparent": (
        lambda: raw_png(0, 16, (1, 1), b"\0\1\2", chunk(b"tRNS", b"\1\2")),
        WHITE,
    ),
    "png, 16-bit RGB": (lambda: raw_png(2, 16, (1, 1), b"\0\xff\xff\x80\x80\0\0"), (255, 128, 0)),
    "png, 16-bit LA": (lambda: raw_png(4, 16, (1, 1), b"\0\x80\x80\xff\xff"), GREY),
    "png, 16-bit RGBA": (lambda: raw_png(6, 16, (1, 1), b"\0\xff\xff" + bytes(6)), WHITE),
    "png, interlaced": (lambda: raw_png(2, 8, (1, 1), b"\0" + bytes(ORANGE), lace=1), ORANGE),
    "png, trailing rubbish": (lambda: encoded(rgb(), "PNG") + b"<script>" * 9, ORANGE),
    "png, animated": (lambda: frames("PNG"), ORANGE),
    "jpeg": (lambda: encoded(rgb(), "JPEG", quality=95), ORANGE),
    "jpeg, grey": (lambda: encoded(flat("L", 128), "JPEG"), GREY),
    "jpeg, progressive": (lambda: encoded(rgb(), "JPEG", progressive=True, quality=95), ORANGE),
    "jpeg, CMYK black": (lambda: encoded(flat("CMYK", (0, 0, 0, 255)), "JPEG"), BLACK),
    "jpeg, CMYK red": (lambda: encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "jpeg, CMYK dark": (lambda: encoded(flat("CMYK", (255, 0, 0, 127)), "JPEG"), (0, 128, 128)),
    "jpeg, several pictures": (lambda: frames("MPO"), ORANGE),
    "jpeg, broken EXIF": (with_broken_exif, ORANGE),
    "webp": (lambda: encoded(rgb(), "WEBP", quality=95), ORANGE),
    "webp, lossless": (lambda: encoded(rgb(), "WEBP", lossless=True), ORANGE),
    "webp, alpha": (
        lambda: encoded(flat("RGBA", (*ORANGE, 128)), "WEBP", lossless=True),
        ON_WHITE,
    ),
    "webp, animated": (lambda: frames("WEBP"), ORANGE),
    "bmp": (lambda: encoded(rgb(), "BMP"), ORANGE),
    "bmp, palette": (lambda: encoded(rgb().quantize(2), "BMP"), ORANGE),
    "avif": (lambda: encoded(rgb(), "AVIF", quality=95), ORANGE),
    "avif, alpha": (lambda: encoded(flat("RGBA", (*ORANGE, 128)), "AVIF", quality=95), ON_WHITE),
    "png, text bomb": (text_bomb, (1, 2, 3)),
    "png, profile of 1.5 MB": (lambda: raw_png(2, 8, (1, 1), PIXEL, chunk(b"iCCP", BIG)), ORANGE),
    "png, iTXt of 1.5 MB": (
        lambda: raw_png(2, 8, (1, 1), PIXEL, chunk(b"iTXt", b"workflow\0\1\0\0\0" + BIG[9:])),
        ORANGE,
    ),
    "png, cut pHYs": (lambda: raw_png(2, 8, (1, 1), PIXEL, chunk(b"pHYs", b"123")), ORANGE),
    "png, text damaged": (
        lambda: raw_png(2, 8, (1, 1), PIXEL, chunk(b"tEXt", b"a\0b")[:-1] + b"?"),
        ORANGE,
    ),
    "png, EXIF damaged": (
        lambda: raw_png(2, 8, (1, 1), PIXEL, chunk(b"eXIf", b"MM\0*")[:-1] + b"?"),
        ORANGE,
    ),
    "png, transparency damaged": (
        lambda: raw_png(2, 8, (1, 1), PIXEL, chunk(b"tRNS", RGB16)[:-1] + b"?"),
        ORANGE,
    ),
    "png, chunks of nobody": (
        lambda: raw_png(2, 8, (1, 1), PIXEL, chunk(b"prVW", bytes(99)) + chunk(b"cICP", b"")),
        ORANGE,
    ),
    "jpeg, a film behind it": (lambda: encoded(rgb(), "JPEG", quality=95) + 999 * SCAN, ORANGE),
    "jpeg, a thumbnail of scans": (
        lambda: with_segment(encoded(rgb(), "JPEG", quality=95), 999 * SCAN),
        ORANGE,
    ),
}

NOT_ONE, DAMAGED, LARGE = "not a PNG, JPEG or WebP", "damaged or cut short", "at most 50 million"
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "html": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", NOT_ONE),
    "text": (lambda: b"hello", NOT_ONE),
    "zeros": (lambda: bytes(100), NOT_ONE),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", NOT_ONE),
    "gif": (lambda: encoded(rgb(), "GIF"), NOT_ONE),
    "bmp, run lengths": (run_length_bmp, "run-length encoded BMP"),
    "bmp, half": (lambda: encoded(rgb(), "BMP")[:-99], DAMAGED),
    "bmp, bomb": (huge_bmp, LARGE),
    "letters BM": (lambda: b"BMW built 507s from 1956 to 1959.", NOT_ONE),
    "avif, half": (lambda: encoded(_noise(), "AVIF")[:900], DAMAGED),
    "heic": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), NOT_ONE),
    "git lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "run git lfs pull",
    ),
    "jpeg, thousands of scans": (lambda: many_scans(3000), "more than 200 scans"),
    "jpeg, empty segments": (
        lambda: encoded(rgb(), "JPEG").replace(b"\xff\xe0", 70_000 * EMPTY + b"\xff\xe0", 1),
        "more than 65536 segments",
    ),
    "png, a million chunks": (
        lambda: raw_png(2, 8, (1, 1), PIXEL, 70_000 * chunk(b"prVW", b"")),
        "more than 65536 chunks",
    ),
    "tiff": (lambda: encoded(rgb(), "TIFF"), NOT_ONE),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NOT_ONE),
    "wave": (lambda: b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), NOT_ONE),
    "png, signature only": (lambda: b"\x89PNG\r\n\x1a\n", DAMAGED),
    "png, half": (lambda: encoded(_noise(), "PNG")[:-9000], DAMAGED),
    "png, no width": (lambda: raw_png(2, 8, (0, 1), b""), DAMAGED),
    "png, bad checksum": (lambda: encoded(rgb(), "PNG").replace(b"IHDR\0", b"IHDR\1"), DAMAGED),
    "png, no pixels": (lambda: raw_png(2, 8, (64, 64), b""), DAMAGED),
    "png, bomb": (lambda: raw_png(2, 8, (30000, 30000), bytes(2**16)), LARGE),
    "png, tall bomb": (lambda: raw_png(0, 1, (1, 2**31 - 1), bytes(2**16)), LARGE),
    "jpeg, header only": (lambda: b"\xff\xd8\xff\xe0", DAMAGED),
    "jpeg, half": (lambda: encoded(_noise(), "JPEG")[:3000], DAMAGED),
    "jpeg, bomb": (huge_jpeg, LARGE),
    "webp, header only": (lambda: b"RIFF\0\0\0\0WEBP", DAMAGED),
    "webp, half": (lambda: encoded(_noise(), "WEBP")[:3000], DAMAGED),
    "webp, bomb": (lambda: huge_webp(b"VP8X", b"\x02" + bytes(3) + b"\xfe\x3f\0" * 2), LARGE),
    "webp, lossless bomb": (lambda: huge_webp(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(99)), LARGE),
    "webp, lossy bomb": (
        lambda: huge_webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(99)),
        LARGE,
    ),
    "webp, unknown chunk": (lambda: huge_webp(b"JUNK", bytes(64)), DAMAGED),
}


def _noise() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("name", GOOD)
def test_a_strange_picture_is_read_as_it_looks(name: str, tmp_path: Path) -> None:
    build, colour = GOOD[name]
    path = tmp_path / "picture.txt"  # the name says nothing
    path.write_bytes(build())
    image = open_picture(path)
    pixels = np.array(image).astype(int)
    lossy = name.startswith(("jpeg", "webp", "avif")) and "lossless" not in name
    assert image.mode == "RGB"
    assert not image.info
    assert np.abs(pixels - colour).max() <= (6 if lossy else 1)


@pytest.mark.parametrize("name", BAD)
def test_a_hostile_picture_is_one_clear_line(name: str, tmp_path: Path) -> None:
    build, message = BAD[name]
    path = tmp_path / "picture.png"
    path.write_bytes(build())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=message) as caught:
        open_picture(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_what_a_png_is_read_without_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = chunk(b"iCCP", BIG) + chunk(b"tEXt", b"a\0b")[:-1] + b"?" + chunk(b"tIME", bytes(7))
    path = tmp_path / "a.png"
    path.write_bytes(raw_png(2, 8, (1, 1), PIXEL, extra))
    with caplog.at_level(logging.WARNING):
        assert open_picture(path).getpixel((0, 0)) == ORANGE
    assert f"{path} is read without its iCCP (1465 KiB), tEXt (damaged)" in caplog.text
    with caplog.at_level(logging.WARNING):
        open_picture(encoded(rgb(), "PNG", icc_profile=bytes(3000), dpi=(72, 72)))
    assert len(caplog.records) == 1  # an ordinary profile is nothing to speak of


def test_scans_that_encoders_write_pass() -> None:
    """Ten of a progressive JPEG, and 200."""
    assert open_picture(many_scans(0)) == open_picture(encoded(rgb(), "JPEG", progressive=True))
    assert many_scans(150).count(SCAN) > 150
    open_picture(many_scans(150))


def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("nothing.png", "No such file"),
        ("pipe", "is not a file"),
        (".", "is not a file"),
        ("a\0b", "cannot open"),
    ):
        with pytest.raises(UserError, match=message):
            open_picture(tmp_path / name)


def test_the_caps_are_limits_that_still_pass() -> None:
    data = encoded(rgb(), "PNG")
    assert open_picture(data, max_bytes=len(data), max_pixels=SIZE[0] * SIZE[1]).size == SIZE
    with pytest.raises(UserError, match="larger than"):
        open_picture(data, max_bytes=len(data) - 1)
    with pytest.raises(UserError, match="24 x 16 pixels"):
        open_picture(data, max_pixels=SIZE[0] * SIZE[1] - 1)
    with pytest.raises(UserError, match="24 x 16 pixels"):
        open_picture(rgb(), max_pixels=9)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = 255, 0, 0
    upright[16:, 32:] = 0, 0, 255
    # EXIF 2.3: where the stored row 0 and column 0 lie in the upright picture
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, quality=95)
    seen = np.array(open_picture(data)).astype(int)
    assert seen.shape == upright.shape
    assert np.abs(seen - upright).mean() < 3


def test_exif_orientation_is_applied_beside_an_entry_of_a_wrong_type() -> None:
    width, orientation = b"\0\1\0\2\0\0\0\4ab\xff\0", b"\1\x12\0\3\0\0\0\1\0\6\0\0"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + width + orientation + b"\0\0\0\0"
    assert open_picture(encoded(rgb(), "JPEG", exif=exif)).size == SIZE[::-1]


def test_the_background_shows_through_and_an_animation_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clear = flat("RGBA", (9, 9, 9, 0))
    assert open_picture(clear, background="#102030").getpixel((0, 0)) == (16, 32, 48)
    assert open_picture(clear.convert("RGBa")).getpixel((0, 0)) == WHITE
    with pytest.raises(UserError, match="unknown colour 'whitish'"):
        open_picture(clear, background="whitish")
    with pytest.raises(UserError, match="mode F"):
        open_picture(Image.new("F", (2, 2)))
    with caplog.at_level(logging.WARNING):
        open_picture(frames("WEBP"))
    assert "only its first frame" in caplog.text


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "AVIF"]), st.floats(0, 1))
def test_a_cut_file_is_refused_or_complete(kind: str, share: float) -> None:
    data = encoded(_noise(), kind)
    whole = open_picture(data)
    try:
        part = open_picture(data[: int(share * (len(data) - 1))])
    except UserError:
        return
    assert part == whole


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "AVIF"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damage_never_ends_in_another_exception(kind: str, hits: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(_noise(), kind))
    for at, value in hits:
        data[at] = value
    try:
        image = open_picture(bytes(data), max_pixels=10**6)
    except UserError:
        return
    assert image.mode == "RGB"


pixels_of_any_size = arrays(np.uint8, st.tuples(*[st.integers(1, 9)] * 2, st.just(3)))


@settings(deadline=None, max_examples=50)
@given(pixels_of_any_size)
def test_pixels_survive_every_way_round(pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    assert open_picture(encoded(image, "WEBP", lossless=True)) == image
    assert open_picture(encode_png(image)) == image
    tensor = to_tensor(image)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, *pixels.shape[:2])
    np.testing.assert_allclose(tensor.numpy(), pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert to_pil(tensor) == image


def test_tensors_that_are_no_pictures_are_refused() -> None:
    assert to_pil(torch.tensor([-7.0, 0.0, 9.0]).reshape(3, 1, 1)).getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(UserError, match="NaN"):
        to_pil(torch.full((3, 2, 2), torch.nan))
    with pytest.raises(UserError, match=r"\[3, H, W\]"):
        to_pil(torch.zeros(1, 3, 2, 2))
    with pytest.raises(UserError, match="mode L"):
        to_tensor(flat("L", 0))


def test_the_middle_square_is_taken() -> None:
    wide = Image.new("RGB", (30, 10), "blue")
    wide.paste("red", (10, 0, 20, 10))
    assert centre_square(wide, 4) == Image.new("RGB", (4, 4), "red")
    assert centre_square(wide.transpose(Image.Transpose.TRANSPOSE), 40).getpixel((39, 39)) == (
        255,
        0,
        0,
    )
    # antialiased: a fine checkerboard becomes grey, not one of its colours
    board = Image.fromarray(np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255).convert("RGB")
    assert np.abs(np.array(centre_square(board, 8)).astype(int) - 127).max() < 8


def test_labels_are_cut_to_the_room_that_there_is() -> None:
    """A prompt of a thousand words beside a row of small pictures, and above one."""
    images = [Image.new("RGB", (40, 30)) for _ in range(2)]
    long = "a cat\n" * 1000
    plain, wide = labelled(images, ["a"], ["b", "c"]), labelled(images, [long], ["b", long])
    assert plain.size[1] == wide.size[1]
    assert plain.size[0] < wide.size[0] <= 80 + 80 + 16
    assert labelled(images, [""], ["b", "c"]).size[0] == 80


def test_a_grid_is_filled_row_by_row() -> None:
    images = [Image.new("RGB", (2, 3), colour) for colour in ("red", "lime", "blue")]
    sheet = grid(images, 2)
    assert sheet.size == (4, 6)
    corners = [sheet.getpixel(at) for at in ((0, 0), (2, 0), (0, 3), (2, 3))]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255), WHITE]
    assert grid(images[:1], 9).size == (2, 3)
    with pytest.raises(UserError, match="at least one"):
        grid([], 3)


def chunks_of(path: Path) -> list[bytes]:
    data, at, kinds = path.read_bytes(), 8, []
    while at < len(data):
        kinds.append(data[at + 4 : at + 8])
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return kinds


def test_without_metadata_a_file_holds_pixels_only(tmp_path: Path) -> None:
    image = _noise()
    image.info.update(icc_profile=b"profile", comment="secret", dpi=(72, 72), exif=b"Exif\0\0")
    path = save_png(image, tmp_path / "a.png")
    assert set(chunks_of(path)) == {b"IHDR", b"IDAT", b"IEND"}
    assert open_picture(path) == _noise()


@settings(deadline=None, max_examples=40)
@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_metadata_comes_back(text: str) -> None:
    data = encode_png(rgb(), {"latentdiff": text, "seed": "7"})
    with Image.open(BytesIO(data)) as image:
        assert image.info == {"latentdiff": text, "seed": "7"}


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path: Path) -> None:
    path = save_png(rgb(), tmp_path / "a.png", {"seed": "1"})
    before = path.read_bytes()
    with pytest.raises(UserError, match="already exists"):
        save_png(_noise(), path)
    with pytest.raises(UserError, match="cannot write"):
        save_png(rgb(), tmp_path / "missing" / "a.png")
    with pytest.raises(UserError, match="not a folder"):
        save_numbered_png(rgb(), path, 0)
    with pytest.raises(UserError, match="cannot write"):
        save_png(rgb(), path / "b.png")
    with pytest.raises(UserError, match="not Unicode"):
        save_png(rgb(), tmp_path / "b.png", {"prompt": "\ud800"})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_go_on_and_are_never_shared(tmp_path: Path) -> None:
    (tmp_path / "00041-3.png").touch()
    (tmp_path / "99999.jpg").touch()
    (tmp_path / ".00060.part").mkdir()  # of a process that was killed
    (tmp_path / ".00050.part").mkdir()  # of another one, still writing
    lock = os.open(tmp_path / ".00050.part", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert save_numbered_png(rgb(), tmp_path, 7).name == "00051-7.png"
    os.close(lock)
    assert save_numbered_png(rgb(), tmp_path, 7).name == "00052-7.png"
    assert not list(tmp_path.glob(".*"))
    folder = tmp_path / "new" / "folder"
    with ThreadPoolExecutor(16) as pool:
        paths = list(pool.map(lambda seed: save_numbered_png(rgb(), folder, seed), range(96)))
    assert sorted(int(path.name[:5]) for path in paths) == list(range(96))
    assert sorted(folder.iterdir()) == sorted(paths)
    assert all(path.name.endswith(f"-{seed}.png") for seed, path in enumerate(paths))
    assert open_picture(paths[5]) == rgb()

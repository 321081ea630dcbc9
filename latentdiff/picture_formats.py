"""Recognise the kind of a picture from its bytes, and open each kind without decoding it.

Each kind's own traps are closed here: a PNG's chunks beside its pixels may be anything, a WebP is
measured before its plugin allocates, a progressive JPEG may ask for thousands of passes.
"""

import re
import zlib
from io import BytesIO

from PIL import features
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from latentdiff.errors import UserError

NAMES = "PNG, JPEG, WebP, BMP or AVIF"
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".avif"},
)

_MAX_SCANS = 200  # of a JPEG; encoders write about ten, and each costs a pass over all pixels
_MAX_PARTS = 2**16  # of any file: segments of a JPEG, chunks of a PNG
_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"acTL"})
_LARGE_CHUNK = 2**18  # bytes of a chunk whose loss is told
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # a JPEG marker that is no byte of a scan
_BARE_MARKERS = (0x01, 0xD8)  # without a length
_BMP_HEADERS = frozenset({12, 40, 52, 56, 64, 108, 124})  # sizes of the kinds that there are
_BMP_PLAIN = (0, 3, 6)  # BI_RGB and bit fields; run lengths are decoded pixel by pixel


def suffix_of(data: bytes) -> str | None:
    """`.png`, `.jpg`, `.webp`, `.bmp` or `.avif` by a file's first bytes; None for no picture."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    if data.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return ".webp"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return ".bmp"
    if data[4:8] == b"ftyp" and any(brand in _brands(data) for brand in (b"avif", b"avis")):
        return ".avif"
    return None


def open_undecoded(data: bytes, name: str, max_pixels: int) -> tuple[ImageFile, list[str]]:
    """The picture in bytes, its size known and its pixels not decoded.

    Not `Image.open`, which only warns of large sizes, and tries every format that there is.

    Args:
        name: for messages.

    Returns:
        The picture, and what of its file was left out that may be missed, in words.

    Raises:
        UserError: no such picture, or one whose decoding would be without bound.
        Exception: whatever Pillow raises on a damaged header.
    """
    left: list[str] = []
    match suffix_of(data):
        case ".png":
            data, left = _png_pixels(data, name)
            image: ImageFile = PngImageFile(BytesIO(data))
        case ".jpg":
            _check_scans(data, name)
            image = JpegImageFile(BytesIO(data))
        case ".webp":
            check_pixels(_webp_size(data), name, max_pixels)  # its plugin allocates when opened
            image = WebPImageFile(BytesIO(data))
        case ".bmp":
            if data[14] > 12 and int.from_bytes(data[30:34], "little") not in _BMP_PLAIN:
                raise UserError(f"{name} is a run-length encoded BMP: save it as PNG")
            image = BmpImageFile(BytesIO(data))
        case ".avif":
            if not features.check("avif"):
                raise UserError(f"{name} is AVIF, which this Pillow cannot read: update it")
            image = AvifImageFile(BytesIO(data))
        case _ if data.startswith(b"version https://git-lfs.github.com/"):
            raise UserError(f"{name} is a Git LFS pointer, not the picture: run git lfs pull")
        case _:
            raise UserError(f"{name} is not a PNG, JPEG or WebP picture, nor a BMP or AVIF")
    check_pixels(image.size, name, max_pixels)
    return image, left


def check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Pass a picture of a sane size.

    Raises:
        UserError: it has more pixels.
    """
    if size[0] * size[1] > max_pixels:
        limit = f"{max_pixels / 1e6:g} million pixels"
        raise UserError(f"{name} has {size[0]} x {size[1]} pixels; at most {limit} are taken")


def _brands(data: bytes) -> list[bytes]:
    """Read the brands in the first box of an ISO media file (ISO/IEC 14496-12, section 4.3)."""
    end = min(int.from_bytes(data[:4]), 256)
    return [data[8:12], *(data[at : at + 4] for at in range(16, end, 4))]


def _png_pixels(data: bytes, name: str) -> tuple[bytes, list[str]]:
    """The chunks of a PNG that its pixels depend on; and the others that are damaged or large.

    A profile, a text or a workflow of any size, sound or not, so keeps no picture from opening (PNG
    specification, section 13.2: a decoder may go on after an error in an ancillary chunk).
    """
    parts, left, at, count = [data[:8]], [], 8, 0
    while at + 8 <= len(data):
        count += 1
        if count > _MAX_PARTS:
            raise UserError(f"{name} has more than {_MAX_PARTS} chunks: save it anew")
        kind, size = data[at + 4 : at + 8], int.from_bytes(data[at : at + 4])
        chunk = data[at : at + 12 + size]
        ancillary = bool(kind[0] & 0x20)
        sound = len(chunk) == 12 + size
        if ancillary and sound:
            sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind in _PIXEL_CHUNKS and (sound or not ancillary):
            parts.append(chunk)
        elif not sound and ancillary:
            left.append(f"{kind.decode('latin-1')} (damaged)")
        elif size >= _LARGE_CHUNK:
            left.append(f"{kind.decode('latin-1')} ({size >> 10} KiB)")
        at += 12 + size
        if kind == b"IEND":
            break
    return b"".join(parts), left


def _check_scans(data: bytes, name: str) -> None:
    """Count a JPEG's scans by its markers (ITU-T T.81, annex B)."""
    at, scans, segments = 2, 0, 0
    while found := _MARKER.search(data, at):
        at, kind = found.end(), data[found.end() - 1]
        segments += 1
        scans += kind == 0xDA
        if kind == 0xD9:  # the end; behind it may be a film, or another picture
            return
        if scans > _MAX_SCANS or segments > _MAX_PARTS:
            what = f"{_MAX_SCANS} scans" if scans > _MAX_SCANS else f"{_MAX_PARTS} segments"
            raise UserError(f"{name} is a JPEG of more than {what}: save it anew")
        if kind not in _BARE_MARKERS:
            at += max(2, int.from_bytes(data[at : at + 2]))


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from the first chunk (RFC 9649, sections 2.5 to 2.7)."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise EOFError("the header is cut short")
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = int.from_bytes(body[6:8], "little"), int.from_bytes(body[8:10], "little")
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError(f"unknown first chunk {kind!r}")

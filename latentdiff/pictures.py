"""The one door through which any picture enters or leaves.

What comes in is not trusted: its format is decided by its content, bytes and pixels are capped
before anything is decoded, and whatever a decoder may raise becomes one `UserError`. What goes out
goes through `latentdiff.files` and replaces no file that is there, unless that is asked for.

Colour profiles are ignored: the numbers are taken to be sRGB, as everywhere in this field.
"""

import logging
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from latentdiff.errors import UserError, shown
from latentdiff.files import write_bytes, write_numbered
from latentdiff.picture_formats import check_pixels, open_undecoded

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000

_log = logging.getLogger(__name__)

_ORIENTATION = 0x0112  # EXIF 2.3, tag 274
_EXIF, _USER_COMMENT = 0x8769, 0x9286
_UPRIGHT = {  # ImageOps.exif_transpose writes the EXIF anew and fails at a foreign entry of it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


Picture = str | Path | bytes | Image.Image
"""A path, the bytes of a file, or an already opened Pillow image."""


def open_picture(
    source: Picture,
    *,
    background: str = "white",
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decodes a PNG, JPEG, WebP, BMP or AVIF picture, whatever its mode, to upright 8-bit RGB.

    Of an animation the first frame is taken, and that is logged. Transparent parts show
    `background` (a colour name or #rrggbb). 16-bit grey is scaled, not clipped; EXIF orientation
    is applied. What else a PNG holds is not read, so it may be damaged or huge; that is logged.

    Args:
        source: a path, the bytes of a file, or an already opened Pillow image.

    Raises:
        UserError: not such a picture, cut short, damaged, or larger than the caps.
    """
    return look_at(source, max_bytes=max_bytes, max_pixels=max_pixels).decode(background)


@dataclass(frozen=True, slots=True)
class Undecoded:
    """A picture that was looked at and not decoded, so that what it will take is known before.

    Attributes:
        name: for messages.
        image: in its own mode, its pixels still packed.
    """

    name: str
    image: Image.Image

    @property
    def pixels(self) -> int:
        """Number of pixels of the decoded picture."""
        return self.image.width * self.image.height

    def decode(self, background: str = "white") -> Image.Image:
        """Upright 8-bit RGB, see `open_picture`.

        Raises:
            UserError: it is cut short or damaged, there is too little memory for it, or there is
                no such colour.
        """
        colour = _colour(background)
        try:
            return _to_rgb(_upright(self), colour, self.name)
        except MemoryError as error:
            raise _damaged(self.name, error) from error


def look_at(
    source: Picture,
    *,
    name: str = "the picture",
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Undecoded:
    """The same without decoding it.

    Args:
        name: what messages call a source that is no path.

    Raises:
        UserError: see `open_picture`.
    """
    if isinstance(source, Image.Image):
        check_pixels(source.size, name, max_pixels)
        return Undecoded(name, source)
    name, data = _read(source, name, max_bytes)
    try:
        image, left = open_undecoded(data, name, max_pixels)
    except UserError:
        raise
    except Exception as error:  # plugins raise nearly anything on hostile input
        raise _damaged(name, error) from error
    if left:
        _log.warning("%s is read without its %s", shown(name), ", ".join(left))
    return Undecoded(name, image)


def open_alpha(source: Picture) -> Image.Image | None:
    """The upright alpha channel (mode L) of a picture; None if no part of it is transparent.

    Raises:
        UserError: see `open_picture`.
    """
    image = _upright(look_at(source))
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I;16"):
        image = _from_16_bit(image)
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def user_comment(data: bytes) -> str | None:
    """The comment in the EXIF (2.3, tag 37510) of a picture's bytes; None if there is none.

    Raises:
        UserError: see `open_picture`.
    """
    try:
        exif = look_at(data).image.getexif()
        comment = exif.get_ifd(_EXIF).get(_USER_COMMENT)
    except UserError:
        raise
    except Exception:  # broken EXIF says nothing
        return None
    if not isinstance(comment, bytes):
        return comment if isinstance(comment, str) else None
    encoding = "utf-16-be" if comment.startswith(b"UNICODE\0") else "utf-8"
    return comment[8:].decode(encoding, "replace").strip("\0 ")


def fit(image: Image.Image, size: int) -> Image.Image:
    """A picture whose longer side is at most `size` pixels (Lanczos), its aspect kept."""
    scale = size / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an RGB picture, resized to `size` pixels a side (Lanczos)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.crop(box).resize((size, size), Image.Resampling.LANCZOS)


def to_uint8(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 tensor [3, H, W] in 0..255."""
    if image.mode != "RGB":
        raise UserError(f"an RGB picture is needed, not mode {image.mode}: use open_picture")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> float32 tensor [3, H, W] in [-1, 1]."""
    return to_uint8(image).float() / 127.5 - 1.0


def to_pil(picture: Tensor) -> Image.Image:
    """Tensor [3, H, W] in [-1, 1], clamped -> RGB picture; the inverse of `to_tensor`.

    Raises:
        UserError: the tensor holds NaN or infinity.
    """
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise UserError(f"a picture tensor is [3, H, W], not {list(picture.shape)}")
    values = picture.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise UserError("the picture holds NaN or infinity: try dtype float32")
    pixels = ((values.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """RGB pictures row by row in one, in cells as large as the largest; the rest is white."""
    if not images or columns < 1:
        raise UserError("a grid needs at least one picture and one column")
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


def labelled(
    images: Sequence[Image.Image], rows: Sequence[str], columns: Sequence[str]
) -> Image.Image:
    """A grid of pictures, row by row, with a label before each row and above each column."""
    inner = grid(images, len(columns))
    width, height = inner.width / len(columns), inner.height / len(rows)
    scale = 2 if width >= 192 else 1
    font = ImageFont.load_default(14 * scale)
    gap = 8 * scale
    rows = [_fitting(label, font, inner.width) for label in rows]
    columns = [_fitting(label, font, width - gap) for label in columns]
    left = round(max(font.getlength(label) for label in rows)) + (2 * gap if any(rows) else 0)
    top = 22 * scale
    image = Image.new("RGB", (left + inner.width, top + inner.height), "white")
    image.paste(inner, (left, top))
    draw = ImageDraw.Draw(image)
    for k, label in enumerate(columns):
        draw.text((left + (k + 0.5) * width, top / 2), label, "black", font, anchor="mm")
    for k, label in enumerate(rows):
        draw.text((left - gap, top + (k + 0.5) * height), label, "black", font, anchor="rm")
    return image


def _fitting(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The longest beginning of a label, on one line, that is at most so wide."""
    line = " ".join(label.split())
    while line and font.getlength(line) > width:
        line = line[: int(len(line) * min(0.9, width / font.getlength(line)))]
    return line


def encode_png(image: Image.Image, metadata: Mapping[str, str] | None = None) -> bytes:
    """The PNG file of an RGB picture, with `metadata` as text chunks."""
    if image.mode != "RGB":
        raise UserError(f"an RGB picture is needed, not mode {image.mode}: use open_picture")
    bare = image.copy()
    bare.info = {}  # Pillow would write a kept colour profile
    chunks = PngInfo()
    for key, text in (metadata or {}).items():
        try:
            chunks.add_text(key, text)
        except UnicodeEncodeError as error:
            raise UserError(f"the text of {key!r} cannot be stored: it is not Unicode") from error
    buffer = BytesIO()
    bare.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def save_png(
    image: Image.Image,
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    *,
    replace: bool = False,
) -> Path:
    """Writes an RGB picture as PNG with `metadata` as text chunks; without it, pixels only.

    Raises:
        UserError: it cannot be written, or a file is there already and is not to be replaced.
    """
    target = Path(path)
    write_bytes(target, encode_png(image, metadata), replace=replace)
    return target


def save_numbered_png(
    image: Image.Image, folder: str | Path, seed: int, metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes `00012-7.png` (the folder's next running number, then the seed) and returns its path.

    The number is this picture's alone, also among processes that write to the folder at the same
    time.

    Raises:
        UserError: the folder or the file cannot be written.
    """
    return write_numbered(Path(folder), f"-{seed}.png", encode_png(image, metadata))


def _upright(picture: Undecoded) -> Image.Image:
    """The decoded picture in its own mode, turned as its EXIF says."""
    name, image = picture.name, picture.image
    try:
        image.load()
        upright = _turned(image)
    except Exception as error:  # decoders raise nearly anything on hostile input
        raise _damaged(name, error) from error
    if getattr(image, "is_animated", False):
        _log.warning("%s is animated: only its first frame is used", shown(name))
    return upright


def _colour(background: str) -> tuple[int, int, int]:
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise UserError(f"unknown colour {background!r}: use a name or #rrggbb") from error


def _read(source: str | Path | bytes, name: str, max_bytes: int) -> tuple[str, bytes]:
    """A name for messages, a path's own where it is one, and the content."""
    if isinstance(source, bytes):
        data = source
    elif not isinstance(source, (str, Path)):
        kind = type(source).__name__
        raise UserError(f"a picture is a path, the bytes of a file or a Pillow image, not {kind}")
    else:
        name, data = str(source), _read_file(Path(source), max_bytes)
    if len(data) > max_bytes:
        raise UserError(f"{name} is larger than {max_bytes / 2**20:.0f} MiB")
    if not data:
        raise UserError(f"{name} is empty")
    return name, data


def _read_file(path: Path, max_bytes: int) -> bytes:
    """Read a file, at most one byte more than `max_bytes`."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        if regular:  # a pipe or device could block for ever
            with path.open("rb") as file:
                return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot open picture {path}: {reason}") from error
    raise UserError(f"{path} is not a file")


def _damaged(name: str, error: Exception) -> UserError:
    if isinstance(error, MemoryError):
        return UserError(f"too little memory to open {name}: make it smaller")
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{name} is damaged or cut short ({reason})")


def _turned(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF says nothing about the pixels
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, colour: tuple[int, int, int], name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _from_16_bit(image)
    if image.mode not in _MODES:
        raise UserError(f"{name} has mode {image.mode}: convert it to 8-bit RGB first")
    if not image.has_transparency_data:
        rgb = image.convert("RGB")
    else:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        rgb = Image.new("RGB", rgba.size, colour)
        rgb.paste(rgba, mask=rgba.getchannel("A"))
    rgb.info = {}  # a profile or comment kept here would leak into the files written from it
    return rgb


def _from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey -> 8-bit (v / 257, rounded), with alpha if the PNG names a transparent value."""
    wide = np.asarray(image, dtype=np.uint16)
    grey = Image.fromarray(((wide.astype(np.uint32) + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        alpha = np.where(wide == transparent, 0, 255).astype(np.uint8)
        grey.putalpha(Image.fromarray(alpha))
    return grey

"""A caption-picture folder out of what a Debian or Ubuntu machine can install: the Noto emoji.

Pictures come from the package `fonts-noto-color-emoji` (Apache-2.0), names and groups from
`unicode-data`, keywords from `unicode-cldr-core` (both under the Unicode licence). The result is
the `imagefolder` layout that `latentdiff.data.folder` reads, and the same to the byte at every
build from the same files with the same Pillow.

Flags of countries, keycaps, letters in boxes and groups of two skin tones are left out: such
pictures are told apart by knowledge, not by what a caption of a few words says.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from latentdiff.data.captions import phrase, variants
from latentdiff.errors import UserError
from latentdiff.files import make_folder, writing_folder
from latentdiff.pictures import centre_square, encode_png

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
ANNOTATIONS = Path("/usr/share/unicode/cldr/common")

STYLE = "noto"
_STRIKE = 109  # the one size at which the font holds its pictures, 136 x 128 pixels each
_ONE_WIDE = 1.5 * _STRIKE  # a sequence that the font does not join is at least two pictures wide

_LINE = re.compile(r"([0-9A-F ]+?) *; fully-qualified *# \S+ E(\d+\.\d+) (.+)")
_LEFT_OUT = frozenset({"alphanum", "country-flag", "keycap", "subdivision-flag"})
_TONES = {
    "\U0001f3fb": "light",
    "\U0001f3fc": "medium-light",
    "\U0001f3fd": "medium",
    "\U0001f3fe": "medium-dark",
    "\U0001f3ff": "dark",
}
_ADULTS = {"1f468": "male", "1f469": "female", "1f9d1": ""}
_SIGNS = {"2640": "female", "2642": "male"}
_HAIR = frozenset({"1f9b0", "1f9b1", "1f9b2", "1f9b3"})
_JOINER = "200d"

# Colours and shapes whose parts are trained in other combinations.
_HELD_COLOURS = frozenset({"1f49a", "1f49c", "1f4d9", "1f535", "1f7e0", "1f7eb"})
_HELD_STRUCTURES = frozenset({"1f313", "1f556", "1f563", "1f63e", "2199"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Emoji:
    """One line of emoji-test.txt: `base` is without skin tone, `family` also without gender."""

    text: str
    name: str
    group: str
    subgroup: str
    version: float
    tone: str

    @property
    def codepoints(self) -> str:
        return _codepoints(self.text)

    @property
    def base(self) -> str:
        return _codepoints("".join(c for c in self.text if c not in _TONES))

    @property
    def gender(self) -> str:
        codes = self.base.split("-")
        signs = [_SIGNS[code] for code in codes if code in _SIGNS]
        return signs[0] if signs else _ADULTS.get(codes[0], "")

    @property
    def family(self) -> str:
        first, *codes = self.base.split("-")
        codes = [code for code in codes if code not in _SIGNS and code not in _HAIR]
        while codes and codes[-1] == _JOINER:
            codes.pop()
        return "-".join(["person" if first in _ADULTS else first, *codes])

    @property
    def split(self) -> str:
        """The split: `train`, or the reason why this emoji is held out.

        Held out are whole families (`test_novel`), single genders or tones of a family, and the
        colours and structures named above.
        """
        if self.base in _HELD_COLOURS:
            return "test_colour"
        if self.base in _HELD_STRUCTURES:
            return "test_struct"
        if _draw("novel", self.family, 64) == 0:
            return "test_novel"
        if self.gender and _draw("gender", self.base, 11) == 0:
            return "test_gender"
        tones = list(_TONES.values())
        if self.tone and _draw("tone", self.base, 24) == tones.index(self.tone):
            return "test_tone"
        return "train"


def build_emoji_folder(
    out: str | Path,
    size: int = 128,
    *,
    font: str | Path = FONT,
    emoji_test: str | Path = EMOJI_TEST,
    annotations: str | Path = ANNOTATIONS,
    progress: bool = True,
) -> int:
    """Draws every emoji on white, `size` pixels a side, with captions; returns how many there are.

    Args:
        out: a new or empty folder.
        annotations: the folder with `annotations/en.xml` and `annotationsDerived/en.xml`.

    Raises:
        UserError: `out` is not empty or cannot be written; a package is missing (the message says
            what to install).
    """
    out, font = Path(out), Path(font)
    keyword_files = [Path(annotations, name, "en.xml") for name in _ANNOTATION_FOLDERS]
    _check_files(font, Path(emoji_test), keyword_files)
    if size < 1:
        raise UserError(f"pictures of {size} pixels cannot be drawn")
    glyphs = _Glyphs(font)
    emoji = list(read_emoji_test(Path(emoji_test)))
    if not emoji:
        raise UserError(f"{emoji_test} names no emoji: is it Unicode's emoji-test.txt?")
    keywords = read_keywords(keyword_files)
    source = f"{font.name}, sha256 {_sha256(font)}"
    make_folder(out.parent)
    with writing_folder(out, replace=False) as stage:
        (stage / "images").mkdir()
        rows: list[dict[str, object]] = []
        for one in tqdm(emoji, desc="emoji", disable=not progress):
            image = glyphs.draw(one.text)
            if image is None:
                continue
            row = metadata(one, keywords.get(one.base, ())) | {"source": source}
            data = encode_png(centre_square(image, size))
            (stage / str(row["file_name"])).write_bytes(data)
            rows.append(row)
        if not rows:
            raise UserError(f"{font} draws none of the emoji of {emoji_test}")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (stage / "metadata.jsonl").write_text(lines, "utf-8", newline="\n")
    if len(rows) < len(emoji):
        _log.warning("%d emoji are left out: %s lacks them", len(emoji) - len(rows), font)
    return len(rows)


def metadata(emoji: Emoji, keywords: tuple[str, ...]) -> dict[str, object]:
    """The row of metadata.jsonl, without `source`."""
    captions = variants(phrase(emoji.name), keywords, STYLE)
    return {
        "file_name": f"images/{STYLE}_{emoji.codepoints}.png",
        "text": captions[0],
        "captions": captions,
        "style": STYLE,
        "emoji": emoji.text,
        "codepoints": emoji.codepoints,
        "name": emoji.name,
        "base": emoji.base,
        "family": emoji.family,
        "skin_tone": emoji.tone,
        "gender": emoji.gender,
        "group": emoji.group,
        "subgroup": emoji.subgroup,
        "keywords": list(keywords),
        "version": emoji.version,
        "split": emoji.split,
        "license": "Apache-2.0",
    }


def read_emoji_test(path: Path) -> Iterator[Emoji]:
    """The fully-qualified emoji of Unicode's emoji-test.txt (UTS #51), less those left out here."""
    group = subgroup = ""
    for line in path.read_text("utf-8", errors="replace").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ").strip()
        elif (match := _LINE.fullmatch(line)) and subgroup not in _LEFT_OUT:
            codes, version, name = match.groups()
            text = "".join(chr(int(code, 16)) for code in codes.split())
            tones = {_TONES[c] for c in text if c in _TONES}
            if len(tones) < 2:
                yield Emoji(text, name, group, subgroup, float(version), "".join(tones))


def read_keywords(files: list[Path]) -> dict[str, tuple[str, ...]]:
    """CLDR keywords (UTS #35, part 2, annotations) by code points, the first file's first."""
    keywords: dict[str, tuple[str, ...]] = {}
    for file in files:
        try:
            entries = ElementTree.parse(file).iter("annotation")
        except ElementTree.ParseError as error:
            raise UserError(f"{file} is not XML: {error}") from error
        for entry in entries:
            if entry.get("type") is None and entry.text:
                words = tuple(word.strip() for word in entry.text.split("|"))
                keywords.setdefault(_codepoints(entry.get("cp", "")), words)
    return keywords


_ANNOTATION_FOLDERS = ("annotations", "annotationsDerived")


class _Glyphs:
    """The pictures in an emoji font."""

    def __init__(self, path: Path) -> None:
        if not features.check("raqm"):
            raise UserError(
                "joined emoji need Pillow with raqm and FriBiDi: sudo apt install libfribidi0"
                " (and Pillow from PyPI, which has raqm)"
            )
        try:
            self.font = ImageFont.truetype(path, _STRIKE, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            raise UserError(
                f"{path} is no font with pictures at size {_STRIKE} ({error}):"
                " sudo apt install fonts-noto-color-emoji"
            ) from error

    def draw(self, text: str) -> Image.Image | None:
        """Draw a glyph on white, RGB; None if the font does not have it as one picture."""
        left, top, right, bottom = self.font.getbbox(text)
        if right <= left or bottom <= top or self.font.getlength(text) > _ONE_WIDE:
            return None
        image = Image.new("RGBA", (round(right - left), round(bottom - top)))
        drawing = ImageDraw.Draw(image)
        drawing.text((-left, -top), text, "black", font=self.font, embedded_color=True)
        sheet = Image.new("RGB", image.size, "white")
        sheet.paste(image, mask=image.getchannel("A"))
        return sheet


def _codepoints(text: str) -> str:
    return "-".join(f"{ord(c):x}" for c in text if c != "\ufe0f")


def _draw(purpose: str, key: str, sides: int) -> int:
    """A die that falls the same for the same key on every machine."""
    digest = hashlib.sha256(f"{purpose}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % sides


def _check_files(font: Path, emoji_test: Path, annotations: list[Path]) -> None:
    packages = {
        font: "fonts-noto-color-emoji",
        emoji_test: "unicode-data",
        **dict.fromkeys(annotations, "unicode-cldr-core"),
    }
    missing = [file for file in packages if not file.is_file()]
    if missing:
        install = " ".join(dict.fromkeys(packages[file] for file in missing))
        raise UserError(f"there is no {missing[0]}: sudo apt install {install}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Pictures made of pictures of single things, with captions that are true by construction.

A sample is a pure function of (seed, number): first a `Scene` says in words and numbers what is
shown, then it is drawn, then it is told. Colours, counts, pairs, places, backgrounds and turned
pictures teach a model what words do; the plain pictures, which training mixes in, what things look
like.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from latentdiff.data.colours import NAMES, PAINTS, dominant, paint, region
from latentdiff.data.cutouts import box, parts, transparency
from latentdiff.data.held_out import has_synonym, is_held_out, is_held_out_pair
from latentdiff.data.wording import (
    NUMBERS,
    Naming,
    article,
    is_plural,
    naming,
    plural,
    styled,
)
from latentdiff.data.wordnet import WordNet
from latentdiff.errors import UserError
from latentdiff.pictures import open_picture
from latentdiff.random_numbers import philox

Kind = Literal["colour", "count", "pair", "place", "background", "upside-down", "mirrored"]

SHARES: dict[Kind, float] = {
    "colour": 0.30, "count": 0.22, "pair": 0.25, "place": 0.10, "background": 0.07,
    "upside-down": 0.04, "mirrored": 0.02,
}  # fmt: skip
"""Shares of the kinds of composed pictures."""

PLACES: dict[str, tuple[float, float]] = {
    "in the top left corner": (0.0, 0.0), "at the top": (0.5, 0.0),
    "in the top right corner": (1.0, 0.0), "on the left": (0.0, 0.5),
    "in the middle": (0.5, 0.5), "on the right": (1.0, 0.5),
    "in the bottom left corner": (0.0, 1.0), "at the bottom": (0.5, 1.0),
    "in the bottom right corner": (1.0, 1.0),
}  # fmt: skip
"""Places of a small thing, across and down: 0 is the left or upper edge, 1 the other."""

BESIDE = ("{} and {}", "{} next to {}", "{} beside {}")
LEFT = ("{} to the left of {}", "{} left of {}")
RIGHT = ("{} to the right of {}", "{} right of {}")
OVER = ("{} above {}", "{} over {}", "{} on top of {}")
UNDER = ("{} below {}", "{} under {}")

_THINGS = frozenset(
    {"Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities",
     "Smileys & Emotion"}
)  # fmt: skip
_NO_TURN = frozenset({"left", "right", "up", "down", "o’clock", "thirty", "clock", "tilted"})


@dataclass(frozen=True, slots=True)
class Thing:
    """One picture of the folder, as compositions need it.

    Attributes:
        row: its place in the folder.
        base: which emoji it is of, without tones.
        style: one of `wording.STYLES`.
        naming: what it may be called.
        colour: the colour most of it has.
        share: how much of it `colour` and its kin take.
        whole: whether it is one connected part.
    """

    row: int
    base: str
    style: str
    naming: Naming
    colour: str
    share: float
    whole: bool

    @property
    def bare(self) -> str:
        """Its name without colours: "red apple" is an apple."""
        words = [word for word in self.naming.name.split() if word not in NAMES]
        return " ".join(words) or self.naming.name


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of a composed picture.

    Attributes:
        kind: which rule made it.
        things: rows of the pictures in it, the one that is named first first.
        colours: what each is painted in, or None.
        count: how many there are of the first.
        form: the template of a pair, or the words of a place.
        background: the colour behind, or None for white.
    """

    kind: Kind
    things: tuple[int, ...]
    colours: tuple[str | None, ...] = (None,)
    count: int = 1
    form: str = ""
    background: str | None = None


# The largest place of each thing: centre and sides, as shares of the picture's side.
_ROWS = {
    1: ((0.5, 0.5, 0.72, 0.72),),
    2: ((0.25, 0.5, 0.42, 0.6), (0.75, 0.5, 0.42, 0.6)),
    4: ((0.26, 0.26, 0.4, 0.4), (0.74, 0.26, 0.4, 0.4), (0.26, 0.74, 0.4, 0.4),
        (0.74, 0.74, 0.4, 0.4)),
}  # fmt: skip
_THREE = (
    ((0.5, 0.25, 0.4, 0.4), (0.26, 0.73, 0.4, 0.4), (0.74, 0.73, 0.4, 0.4)),
    ((0.18, 0.5, 0.27, 0.4), (0.5, 0.5, 0.27, 0.4), (0.82, 0.5, 0.27, 0.4)),
    ((0.26, 0.27, 0.4, 0.4), (0.74, 0.27, 0.4, 0.4), (0.5, 0.75, 0.4, 0.4)),
)
_ACROSS = ((0.25, 0.5, 0.43, 0.7), (0.75, 0.5, 0.43, 0.7))
_DOWN = ((0.5, 0.25, 0.7, 0.43), (0.5, 0.75, 0.7, 0.43))


def read_things(
    root: Path, rows: Sequence[Mapping[str, object]], words: WordNet | None, size: int = 128
) -> tuple[list[Thing], np.ndarray, np.ndarray]:
    """Every row's thing, pictures uint8 [N, size, size, 3] and transparency uint8 [N, size, size].

    Args:
        rows: of `metadata.jsonl`, on white.
    """
    pictures = np.empty((len(rows), size, size, 3), np.uint8)
    alphas = np.empty((len(rows), size, size), np.uint8)
    things: list[Thing] = []
    for number, row in enumerate(rows):
        image = open_picture(root / str(row["file_name"]))
        pictures[number] = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
        alphas[number] = transparency(pictures[number])
        things.append(describe(number, row, pictures[number], alphas[number], words))
    return things, pictures, alphas


def describe(
    number: int,
    row: Mapping[str, object],
    picture: np.ndarray,
    alpha: np.ndarray,
    words: WordNet | None,
) -> Thing:
    """Find what compositions need to know of one picture [H, W, 3] with its transparency [H, W]."""
    mask = alpha > 127
    colour, _ = dominant(picture, mask)
    share = float(region(picture, mask, colour).sum()) / max(1, int(mask.sum()))
    found = parts(mask, 0.02) if mask.any() else []
    return Thing(
        number, str(row["base"]), str(row["style"]), naming(row, words), colour, share,
        len(found) == 1 and bool(mask.mean() > 0.06),
    )  # fmt: skip


@contextmanager
def blaming_folder(root: Path) -> Iterator[None]:
    """Tell in one line what a folder of single things lacks, or why it cannot be read.

    Raises:
        UserError: in place of a KeyError or an OSError.
    """
    try:
        yield
    except KeyError as error:
        raise UserError(
            f"{root}/metadata.jsonl lacks the field {error}, see docs/data.md"
        ) from None
    except OSError as error:
        raise UserError(f"{root}: {error.strerror or error}") from None


def read_rows(root: Path, split: str | None = "train") -> list[dict[str, object]]:
    """The rows of `metadata.jsonl`, of one split or all."""
    lines = (root / "metadata.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line]
    return [row for row in rows if split is None or row["split"] == split]


class Composer:
    """Composed pictures of a folder: `sample(number)`.

    Args:
        rows: of `metadata.jsonl`.
        things, pictures, alphas: as `read_things` gives them.
        seed: of every choice.
        style_words: how often a caption names the style.
        other_words: how often a caption says another word for a thing than its name.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, object]],
        things: Sequence[Thing],
        pictures: np.ndarray,
        alphas: np.ndarray,
        seed: int,
        style_words: float = 0.6,
        other_words: float = 0.25,
    ) -> None:
        self.things = things
        self.pictures = pictures
        self.alphas = alphas
        self.seed = seed
        self.style_words = style_words
        self.other_words = other_words
        usable = [
            thing
            for thing, row in zip(things, rows, strict=True)
            if row["group"] in _THINGS and not row["skin_tone"] and not row["gender"]
        ]
        single = [t for t in usable if t.whole and _countable(t.naming.name)]
        self.pools = {
            "paint": _by_base([t for t in usable if t.share >= 0.45 and not is_plural(t.bare)]),
            "single": _by_base(single),
            "any": _by_base([t for t in usable if not is_plural(t.naming.name)]),
            "turn": _by_base(
                [t for t in usable if not _NO_TURN & set(t.naming.name.split())]
            ),
        }  # fmt: skip

    def sample(self, number: int) -> tuple[np.ndarray, str, Scene]:
        """Picture uint8 [H, W, 3], caption and scene: a function of (seed, number)."""
        for attempt in range(20):
            random = philox(self.seed, 22, number, attempt)
            scene = self.scene(random)
            picture = self.draw(scene, random)
            if picture is not None:
                caption = self.caption(scene, random)
                if not has_synonym(caption):
                    return picture, caption, scene
        raise RuntimeError("no composition of these pictures comes out true")

    def scene(self, random: np.random.Generator) -> Scene:
        """Choose what is shown."""
        kinds = list(SHARES)
        kind = kinds[int(random.choice(len(kinds), p=list(SHARES.values())))]
        pool = {"colour": "paint", "count": "single", "pair": "single", "place": "any"}
        thing = self._one(pool.get(kind, "turn" if kind != "background" else "any"), random)
        scene = Scene(kind, (thing.row,))
        if kind == "colour":
            return replace(scene, colours=(self._paint(thing, random),))
        if kind == "count":
            count = (1, 2, 2, 3, 3, 4)[random.integers(6)]
            return replace(scene, count=count, colours=(self._perhaps(thing, 0.25, random),))
        if kind == "pair":
            return self._pair(scene, thing, random)
        if kind == "place":
            places = list(PLACES)
            form = places[random.integers(len(places))]
            return replace(scene, form=form, colours=(self._perhaps(thing, 0.15, random),))
        if kind == "background":
            paints = list(PAINTS)
            return replace(scene, background=paints[random.integers(len(paints))])
        return scene

    def draw(self, scene: Scene, random: np.random.Generator) -> np.ndarray | None:
        """Draw it: uint8 [H, W, 3]; None if a paint does not come out as the colour it is."""
        painted: list[np.ndarray] = []
        for row, colour in zip(scene.things, scene.colours, strict=True):
            picture = self.pictures[row]
            if colour is not None:
                mask = self.alphas[row] > 127
                where = region(picture, mask, self.things[row].colour)
                jitter = 1 + 0.06 * random.standard_normal(3)
                picture = paint(picture, where, colour, jitter)
                found, share = dominant(picture, mask)
                if found != colour or share < 0.4:
                    return None
            painted.append(picture)
        if scene.kind == "colour":
            return painted[0]
        if scene.kind == "upside-down":
            return np.ascontiguousarray(painted[0][::-1, ::-1])
        if scene.kind == "mirrored":
            return np.ascontiguousarray(painted[0][:, ::-1])
        return self._placed(scene, painted, random)

    def caption(self, scene: Scene, random: np.random.Generator) -> str:
        """Say what it shows, with or without the words of its style."""
        said = [self._said(scene, place, random) for place in range(len(scene.things))]
        if scene.kind == "count":
            name = f"{scene.colours[0]} {said[0]}" if scene.colours[0] else said[0]
            number = NUMBERS[scene.count] if random.random() < 0.85 else str(scene.count)
            text = f"{number} {plural(name) if scene.count > 1 else name}"
        else:
            named = [
                article(f"{colour} {name}" if colour else name)
                for colour, name in zip(scene.colours, said, strict=True)
            ]
            text = self._told(scene, named, said[0], random)
        style = self.things[scene.things[0]].style
        return styled(text, style if random.random() < self.style_words else None, random)

    def _told(
        self, scene: Scene, named: list[str], name: str, random: np.random.Generator
    ) -> str:  # fmt: skip
        if scene.kind == "pair":
            return scene.form.format(*named)
        if scene.kind == "place":
            small = ("small", "tiny", "little")[random.integers(3)]
            colour = f"{scene.colours[0]} " if scene.colours[0] else ""
            return f"{article(f'{small} {colour}{name}')} {scene.form}"
        if scene.kind == "background":
            behind = scene.background
            return f"{named[0]} on {article(f'{behind} background')}"
        if scene.kind == "upside-down":
            return (f"{named[0]} upside down", article(f"upside down {name}"))[random.integers(2)]
        if scene.kind == "mirrored":
            return f"{named[0]}, mirrored"
        return named[0]

    def _said(self, scene: Scene, place: int, random: np.random.Generator) -> str:
        """The name of one of the things; a painted thing's without its own colour."""
        thing = self.things[scene.things[place]]
        if scene.colours[place] is not None and thing.bare != thing.naming.name:
            return thing.bare
        return thing.naming.any(random, self.other_words)

    def _one(self, pool: str, random: np.random.Generator, style: str | None = None) -> Thing:
        """A thing: every emoji alike, and every one of its styles."""
        bases = self.pools[pool]
        while True:
            found = bases[random.integers(len(bases))]
            found = [t for t in found if style is None or t.style == style]
            if found:
                return found[random.integers(len(found))]

    def _paint(self, thing: Thing, random: np.random.Generator) -> str:
        """A colour that the thing may have and does not have."""
        paints = [
            colour
            for colour in PAINTS
            if colour != thing.colour
            and not any(is_held_out(colour, n) for n in (thing.naming.name, *thing.naming.also))
        ]
        return paints[random.integers(len(paints))]

    def _perhaps(self, thing: Thing, share: float, random: np.random.Generator) -> str | None:
        fits = thing.share >= 0.45 and random.random() < share
        return self._paint(thing, random) if fits else None

    def _pair(self, scene: Scene, first: Thing, random: np.random.Generator) -> Scene:
        second = first
        while second.base == first.base or is_held_out_pair(first.base, second.base):
            second = self._one("single", random, first.style)
        kinds = (BESIDE, BESIDE, LEFT, RIGHT, OVER, UNDER)
        forms = kinds[random.integers(len(kinds))]
        colours = (self._perhaps(first, 0.2, random), self._perhaps(second, 0.2, random))
        form = forms[random.integers(len(forms))]
        return replace(scene, things=(first.row, second.row), colours=colours, form=form)

    def _placed(
        self, scene: Scene, painted: list[np.ndarray], random: np.random.Generator
    ) -> np.ndarray:
        """Things in their boxes on the background."""
        side = self.pictures.shape[1]
        canvas = np.full((side, side, 3), 255.0, np.float32)
        if scene.background is not None:
            target = np.array(PAINTS[scene.background], np.float32)
            canvas[:] = target * (1 + 0.05 * random.standard_normal(3).astype(np.float32))
        boxes = _boxes(scene, random)
        for number, (x, y, wide, high) in enumerate(boxes):
            which = min(number, len(painted) - 1)
            alpha = self.alphas[scene.things[which]]
            _paste(canvas, painted[which], alpha, (x * side, y * side, wide * side, high * side))
        return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def _by_base(things: Sequence[Thing]) -> list[list[Thing]]:
    found: dict[str, list[Thing]] = {}
    for thing in things:
        found.setdefault(thing.base, []).append(thing)
    return list(found.values())


def _countable(name: str) -> bool:
    words = set(name.split())
    bare = words & {"and", "with", "of", "showing", "thirty", "o’clock"}
    return not is_plural(name) and len(words) <= 3 and not bare and article(name) != name


def _boxes(
    scene: Scene, random: np.random.Generator
) -> list[tuple[float, float, float, float]]:  # fmt: skip
    """Centre and sides of each thing's place, as shares of the picture's side."""
    if scene.kind == "pair":
        turned = scene.form in (*OVER, *UNDER)
        chosen = list(_DOWN if turned else _ACROSS)
        if scene.form in (*RIGHT, *UNDER):
            chosen.reverse()
    elif scene.kind == "place":
        x, y = PLACES[scene.form]
        size = 0.3 + 0.14 * random.random()
        edge = 0.03 + size / 2
        chosen = [(edge + x * (1 - 2 * edge), edge + y * (1 - 2 * edge), size, size)]
    elif scene.kind == "count" and scene.count == 3:
        chosen = list(_THREE[random.integers(len(_THREE))])
    else:
        chosen = list(_ROWS[scene.count])
    scale = 1 - 0.12 * random.random()
    shift = 0.012 * random.standard_normal((len(chosen), 2)).clip(-1, 1)
    still = scene.kind == "place"
    return [
        (x + (0 if still else dx), y + (0 if still else dy), wide * scale, high * scale)
        for (x, y, wide, high), (dx, dy) in zip(chosen, shift.tolist(), strict=True)
    ]


def _paste(
    canvas: np.ndarray,
    picture: np.ndarray,
    alpha: np.ndarray,
    where: tuple[float, float, float, float],
) -> None:
    """Put a thing on a canvas float32 [H, W, 3], as large as its place allows.

    A picture on white is alpha * thing + (1 - alpha) * white, so the thing is never divided out.
    """
    x, y, wide, high = where
    left, top, right, bottom = box(alpha > 40)
    scale = min(wide / (right - left), high / (bottom - top))
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    both = np.concatenate([picture, alpha[..., None]], -1)
    image = Image.fromarray(both, "RGBX" if both.shape[-1] == 3 else "RGBA")
    bands = [
        band.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC,
                    (left, top, right, bottom))
        for band in image.split()
    ]  # fmt: skip
    small = np.stack([np.asarray(band) for band in bands], -1).astype(np.float32)
    side = canvas.shape[0]
    at_x = min(max(round(x - size[0] / 2), 0), side - size[0])
    at_y = min(max(round(y - size[1] / 2), 0), side - size[1])
    clear = 1 - small[..., 3:] / 255
    patch = canvas[at_y : at_y + size[1], at_x : at_x + size[0]]
    patch *= clear
    patch += small[..., :3] - 255 * clear


def plain_captions(
    row: Mapping[str, object], thing: Thing, random: np.random.Generator, count: int
) -> list[str]:
    """True captions of a picture as it is: its name and other words for it, its folder's own
    captions, its colour, its styles; none with a word that is held out."""
    own = [str(c).replace("-", " ") for c in row["captions"]]  # pyright: ignore
    own = [caption for caption in own if not has_synonym(caption)]
    name = thing.naming.name
    found: list[str] = []
    while len(found) < count:
        kind = random.random()
        style = thing.style if random.random() < 0.8 else None
        if kind < 0.3 and own:
            caption = own[int(random.integers(len(own))) if random.random() < 0.5 else 0]
        elif kind < 0.42 and thing.naming.also:
            caption = styled(article(thing.naming.any(random, 1.0)), style, random)
        elif kind < 0.45 and thing.naming.broader:
            words = thing.naming.broader
            caption = styled(article(words[random.integers(len(words))]), style, random)
        elif kind < 0.57 and _coloured(thing):
            caption = styled(article(f"{thing.colour} {thing.bare}"), style, random)
        else:
            caption = styled(article(name), style, random)
        if not has_synonym(caption):
            found.append(caption)
    return found


def _coloured(thing: Thing) -> bool:
    """Tell whether a thing is of one colour, may be called so, and its name has none."""
    fits = thing.share >= 0.6 and thing.bare == thing.naming.name and len(thing.bare.split()) <= 3
    return fits and not is_plural(thing.bare) and not is_held_out(thing.colour, thing.bare)

"""Prompts whose right answers are known, and how many of the pictures drawn for them are right.

Nothing here has been in a training caption: colours for things that were never painted so, pairs
that were kept apart, words that were left out; counts and captions of real pictures, which were.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.captions import with_article
from latentdiff.data.composition import OVER, UNDER, Composer, Scene, Thing
from latentdiff.data.held_out import COLOURED, SYNONYMS, is_held_out_pair
from latentdiff.data.wording import NUMBERS, plural
from latentdiff.metrics.following import Shapes, colour_of, count_of
from latentdiff.metrics.nearest import blurred_thumbnails, nearest
from latentdiff.random_numbers import philox

Draw = Callable[[list[str]], Tensor]
"""Prompts -> pictures [N, 3, H, W] in [-1, 1], the same for the same prompts."""

FORMS = ("{} next to {}", "{} and {}", "{} to the left of {}", "{} above {}")


@dataclass(frozen=True)
class Question:
    """A prompt and what its picture must show.

    Attributes:
        bases: emoji that are right for the first thing.
        second: for the second one of a pair.
        colour: of the thing, or "".
        count: how many there are, or 0 where that is not asked.
        down: whether the second is below and not to the right.
        pictures: rows of real pictures that are the asked one, for captions of real pictures.
    """

    prompt: str
    bases: frozenset[str] = frozenset()
    second: frozenset[str] = frozenset()
    colour: str = ""
    count: int = 0
    down: bool = False
    pictures: tuple[int, ...] = ()


@dataclass
class Judge:
    """The real pictures and what is known of them.

    Attributes:
        rows: of the whole folder's `metadata.jsonl`.
        things, pictures, alphas: as `composition.read_things` gives them, for all rows.
        composer: of the training rows, for the things that compositions are made of.
        device: where distances are computed.
    """

    rows: Sequence[Mapping[str, object]]
    things: Sequence[Thing]
    pictures: np.ndarray
    alphas: np.ndarray
    composer: Composer
    seed: int = 0
    device: str = "cpu"
    thumbnails: Tensor = field(init=False)
    shapes: Shapes = field(init=False)

    def __post_init__(self) -> None:
        real = torch.from_numpy(self.pictures).permute(0, 3, 1, 2)
        self.thumbnails = blurred_thumbnails(real).to(self.device)
        used = [thing for found in self.composer.pools["any"] for thing in found]
        places = [thing.row for thing in used]
        composer = self.composer
        self.shapes = Shapes(
            composer.pictures[places], composer.alphas[places], [thing.base for thing in used]
        )

    def captions(self, split: str, most: int) -> list[Question]:
        """First captions of a split's pictures; every emoji and style as often as another."""
        places = [i for i, row in enumerate(self.rows) if row["split"] == split]
        random = philox(self.seed, 40, len(split))
        if len(places) > most:
            keys = [(self.things[i].style, self.things[i].base) for i in places]
            counts = Counter(keys)
            weights = np.array([1 / counts[key] for key in keys])
            chosen = random.choice(len(places), most, replace=False, p=weights / weights.sum())
            places = [places[int(i)] for i in chosen]
        alike: dict[object, list[int]] = {}
        for place, row in enumerate(self.rows):
            alike.setdefault(row["codepoints"], []).append(place)
        return [
            Question(
                str(self.rows[place]["captions"][0]).replace("-", " "),  # pyright: ignore
                pictures=tuple(alike[self.rows[place]["codepoints"]]),
            )
            for place in places
        ]

    def synonyms(self) -> list[Question]:
        """Every held-out word for a thing that there is."""
        found: list[Question] = []
        for word, names in SYNONYMS.items():
            allowed = set(names.split("|"))
            right = tuple(i for i, row in enumerate(self.rows) if row["name"] in allowed)
            if right:
                found.append(Question(with_article(word), pictures=right))
        return found

    def coloured(self) -> list[Question]:
        """Every held-out colour and thing that no real picture shows either."""
        found: list[Question] = []
        for colour, word in COLOURED:
            named = [
                things
                for things in self.composer.pools["paint"]
                if word in things[0].bare.split() and len(things) > 1
            ]
            if not named:
                continue
            best = min(named, key=lambda things: (len(things[0].bare.split()), things[0].base))
            bare = best[0].bare
            alike = [things for things in named if things[0].bare in (bare, f"{bare} face")]
            if any(thing.colour == colour for things in alike for thing in things):
                continue
            bases = frozenset(things[0].base for things in alike)
            found.append(Question(with_article(f"{colour} {bare}"), bases, colour=colour))
        return found

    def counts(self, most: int) -> list[Question]:
        """One, two and three of things."""
        random = philox(self.seed, 41)
        pool = self.composer.pools["single"]
        chosen = random.choice(len(pool), min(most, len(pool)), replace=False)
        return [
            Question(f"{NUMBERS[count]} {plural(name) if count > 1 else name}", bases, count=count)
            for thing in (pool[int(i)][0] for i in chosen)
            for name, bases in ((thing.naming.name, frozenset({thing.base})),)
            for count in (1, 2, 3)
        ]

    def pairs(self, most: int) -> list[Question]:
        """Two things that no training picture puts together."""
        random = philox(self.seed, 42)
        pool = self.composer.pools["single"]
        found: list[Question] = []
        for _ in range(100 * most):
            first, second = (pool[int(i)][0] for i in random.integers(len(pool), size=2))
            fits = first.base != second.base and is_held_out_pair(first.base, second.base)
            if fits and len(found) < most:
                form = FORMS[len(found) % len(FORMS)]
                named = (with_article(first.naming.name), with_article(second.naming.name))
                bases = frozenset({first.base}), frozenset({second.base})
                found.append(Question(form.format(*named), *bases, down="above" in form))
        return found

    def right(self, drawn: Tensor, questions: Sequence[Question]) -> dict[str, list[bool]]:
        """Mark pictures [N, 3, H, W] in [-1, 1] right or wrong, by every measure that applies."""
        found: dict[str, list[bool]] = {}
        _, at = nearest(blurred_thumbnails(drawn).to(self.thumbnails.device), self.thumbnails)
        for picture, near, asked in zip(to_bytes(drawn), at.tolist(), questions, strict=True):
            marks: dict[str, bool] = {}
            if asked.pictures:
                marks["shows"] = near in asked.pictures
            elif asked.second:
                marks["both"] = self.shapes.shows_both(
                    picture, asked.bases, asked.second, asked.down
                )
                marks["two"] = count_of(picture) == 2
            elif asked.count:
                marks["count"] = count_of(picture) == asked.count
            else:
                marks["colour"] = colour_of(picture) == asked.colour
                marks["shape"] = self.shapes.shows(picture, asked.bases)
                marks["colour and shape"] = marks["colour"] and marks["shape"]
            for name, mark in marks.items():
                found.setdefault(name, []).append(mark)
        return found

    def diversity(self, draw: Callable[[list[str], int], Tensor], most: int) -> float:
        """Mean distance of four seeds' pictures over that of the four styles' real pictures.

        Args:
            draw: prompts and a seed -> pictures [N, 3, H, W] in [-1, 1].
        """
        four = [t for t in self.composer.pools["any"] if len({one.style for one in t}) == 4]
        chosen = philox(self.seed, 43).choice(len(four), min(most, len(four)), replace=False)
        things = [four[int(i)] for i in chosen]
        prompts = [with_article(found[0].naming.name) for found in things]
        drawn = torch.stack([blurred_thumbnails(draw(prompts, seed)) for seed in range(4)], 1)
        size = self.composer.pictures
        real = [
            blurred_thumbnails(
                torch.from_numpy(size[[thing.row for thing in found[:4]]]).permute(0, 3, 1, 2)
            )
            for found in things
        ]
        of_seeds = torch.stack([_apart(four_) for four_ in drawn]).mean()
        return float(of_seeds / torch.stack([_apart(four_) for four_ in real]).mean())


def _apart(thumbnails: Tensor) -> Tensor:
    """Mean root mean square distance of all pairs of [N, D]."""
    return torch.pdist(thumbnails).mean() / thumbnails.shape[1] ** 0.5


def to_bytes(pictures: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] -> uint8 [N, H, W, 3]."""
    unit = (pictures.float().cpu().clamp(-1, 1) + 1) * 127.5
    return unit.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def ceiling(judge: Judge, first: int, count: int) -> dict[str, float]:
    """Share of a composer's own pictures that the judge calls right: `count` from `first` on."""
    found: dict[str, list[bool]] = {}
    composer = judge.composer
    for number in range(first, first + count):
        picture, _, scene = composer.sample(number)
        asked = question_of(scene, composer)
        if asked is not None:
            drawn = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
            for name, marks in judge.right(drawn, [asked]).items():
                found.setdefault(name, []).extend(marks)
    return {name: sum(marks) / len(marks) for name, marks in found.items()}


def question_of(scene: Scene, composer: Composer) -> Question | None:
    """Find what a judge would ask of a composed picture, if it can."""
    things = [composer.things[row] for row in scene.things]
    bases = [frozenset({thing.base}) for thing in things]
    if scene.kind == "colour":
        return Question("", bases[0], colour=scene.colours[0] or "")
    if scene.kind == "count":
        return Question("", bases[0], count=scene.count)
    if scene.kind == "pair":
        turned = "right" in scene.form or scene.form in UNDER
        first, second = bases[::-1] if turned else bases
        return Question("", first, second, down=scene.form in (*OVER, *UNDER))
    return None

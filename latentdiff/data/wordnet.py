"""Nouns of WordNet: words of the same meaning, broader words, glosses.

Reads the two files `index.noun` and `data.noun` of WordNet 3 (the Debian and Ubuntu package
`wordnet-base`; the format is that of its manual page wndb).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from latentdiff.errors import UserError

CONCRETE = frozenset({5, 6, 8, 13, 17, 18, 19, 20, 25})
"""Lexicographer files of what can be drawn: animal, artifact, body, food, object, person,
phenomenon, plant, shape."""

# The sense of a name is one whose broader words hold one of these, by the emoji's group.
ROOTS = {
    "Animals & Nature": {"animal", "plant", "plant_part", "fungus", "natural_object", "web"},
    "Food & Drink": {"food", "fruit", "vegetable", "foodstuff", "beverage", "container", "plant",
                     "tableware", "kitchen_utensil", "animal", "glass", "vessel"},
    "Travel & Places": {"artifact", "geological_formation", "natural_object", "weather",
                        "natural_phenomenon", "celestial_body", "location"},
    "Objects": {"artifact", "instrumentality", "clothing", "substance", "document", "covering"},
    "Activities": {"artifact", "instrumentality", "covering", "game_equipment"},
    "Smileys & Emotion": {"spiritual_being", "artifact", "organ"},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Meaning:
    """One meaning of one or several nouns.

    Attributes:
        file: number of the lexicographer file, see `CONCRETE`.
        words: lemmas, the most usual first, with underscores for spaces.
        broader: offsets of the next broader meanings.
        gloss: its definition.
    """

    file: int
    words: tuple[str, ...]
    broader: tuple[int, ...]
    gloss: str


class WordNet:
    """The nouns under `folder`.

    Raises:
        UserError: the files are not there.
    """

    def __init__(self, folder: Path) -> None:
        try:
            data = (folder / "data.noun").read_text("utf-8").splitlines()
            index = (folder / "index.noun").read_text("utf-8").splitlines()
        except OSError as error:
            raise UserError(
                f"cannot read WordNet's {error.filename}: sudo apt install wordnet-base"
            ) from None
        self.meanings = dict(_meaning(line) for line in data if not line.startswith("  "))
        self.senses = dict(_senses(line) for line in index if not line.startswith("  "))

    def sense(self, word: str, roots: Collection[str]) -> Meaning | None:
        """The first of a noun's first three meanings that is a kind of one of `roots`."""
        for offset in self.senses.get(word.lower().replace(" ", "_"), ())[:3]:
            if any(not roots.isdisjoint(one.words) for one in self.above(offset)):  # pyright: ignore
                return self.meanings[offset]
        return None

    def above(self, offset: int) -> Iterator[Meaning]:
        """A meaning and all broader ones, the nearest first."""
        queue, seen = [offset], set[int]()
        while queue:
            at = queue.pop(0)
            if at not in seen:
                seen.add(at)
                yield self.meanings[at]
                queue += self.meanings[at].broader

    def synonyms(self, word: str, group: str) -> list[str]:
        """Other words for a thing of an emoji's group, as running text."""
        found = self.sense(word, ROOTS.get(group, set()))
        own = word.lower()
        return [] if found is None else [w for w in _spoken(found.words) if w.lower() != own]

    def broader(self, word: str, group: str) -> list[str]:
        """The next broader words for it: for "apple", "edible fruit" and "pome"."""
        found = self.sense(word, ROOTS.get(group, set()))
        return [] if found is None else _spoken(self.meanings[o].words[0] for o in found.broader)

    def concrete(self) -> Iterator[Meaning]:
        """Every meaning of what can be drawn."""
        return (one for one in self.meanings.values() if one.file in CONCRETE)


def _spoken(words: Iterator[str] | tuple[str, ...]) -> list[str]:
    return [word.replace("_", " ") for word in words]


def _meaning(line: str) -> tuple[int, Meaning]:
    head, _, gloss = line.partition(" | ")
    parts = head.split()
    count = int(parts[3], 16)
    words = tuple(parts[4 + 2 * i] for i in range(count))
    rest = parts[4 + 2 * count + 1 :]
    broader = tuple(int(rest[i + 1]) for i in range(0, len(rest) - 3, 4) if rest[i] in ("@", "@i"))
    meaning = Meaning(int(parts[1]), words, broader, gloss.split(";")[0].strip())
    return int(parts[0]), meaning


def _senses(line: str) -> tuple[str, tuple[int, ...]]:
    parts = line.split()
    return parts[0], tuple(int(part) for part in parts[-int(parts[2]) :])

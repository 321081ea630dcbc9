"""The words of captions: plurals, colours, numbers, styles, and what things are called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentdiff.data.captions import phrase, with_article
from latentdiff.data.held_out import has_synonym
from latentdiff.data.wordnet import WordNet

if TYPE_CHECKING:
    import numpy as np  # whose random numbers take a while to import

NUMBERS = ("zero", "one", "two", "three", "four")

STYLES: dict[str, tuple[str, ...]] = {
    "noto": ("noto emoji of {a}", "{the}, noto style", "a noto emoji of {the}", "noto {the}"),
    "twemoji": ("twemoji of {a}", "{the}, twemoji style", "a twemoji of {the}", "twemoji {the}"),
    "fluent-3d": (
        "3d emoji of {a}", "{the}, 3d render", "a 3d emoji of {the}", "{the}, fluent 3d style",
        "fluent 3d {the}",
    ),
    "fluent-flat": (
        "flat emoji of {a}", "{the}, flat icon", "a flat emoji of {the}",
        "{the}, fluent flat style", "fluent flat {the}",
    ),
}  # fmt: skip
"""Captions that name a style; {a} is the description with its article, {the} without."""

PLAIN = ("{the}", "{a}", "{a}", "an emoji of {a}", "a picture of {a}", "a drawing of {a}")
"""Captions that name none."""

# How a held-out word in a name is said instead.
_SAID = {"automobile": "car"}
_IRREGULAR = {
    "mouse": "mice", "leaf": "leaves", "knife": "knives", "wolf": "wolves", "goose": "geese",
    "calf": "calves", "fish": "fish", "sheep": "sheep", "deer": "deer", "moose": "moose",
    "bison": "bison", "shrimp": "shrimp", "squid": "squid", "ox": "oxen", "man": "men",
    "woman": "women", "person": "people", "child": "children", "foot": "feet", "tooth": "teeth",
    "loaf": "loaves", "mango": "mangoes", "tomato": "tomatoes", "potato": "potatoes",
    "scarf": "scarves", "fly": "flies",
}  # fmt: skip
_JOINTS = ("and", "at", "in", "of", "on", "with", "without", "behind", "showing", "not", "tilted")
_RUDE = frozenset({"cock", "ass", "pussy", "bastard", "dick", "machine", "hooter", "tool"})


@dataclass(frozen=True, slots=True)
class Naming:
    """Names that one emoji may be called.

    Attributes:
        name: its CLDR name as running text, without the words that are held out.
        also: other words that mean it alone.
        broader: words for more than it.
    """

    name: str
    also: tuple[str, ...]
    broader: tuple[str, ...]

    def any(self, random: "np.random.Generator", other: float) -> str:
        """The name, or with the probability `other` one of the other words for it."""
        if self.also and random.random() < other:
            return self.also[random.integers(len(self.also))]
        return self.name


def naming(fields: Mapping[str, object], words: WordNet | None) -> Naming:
    """The names of a row of `metadata.jsonl`; without WordNet only its own."""
    spoken = phrase(str(fields["name"])).replace("-", " ")
    name = " ".join(_SAID.get(word, word) for word in spoken.split())
    group = str(fields["group"])
    if words is None:
        return Naming(name, (), ())
    heads = [name]
    if name.endswith(" face"):
        heads.append(name.removesuffix(" face"))
    also = [word for head in heads for word in words.synonyms(head, group)]
    broader = [word for head in heads for word in words.broader(head, group)]
    return Naming(name, _allowed(also, name), _allowed(broader, name))


def _allowed(words: Sequence[str], name: str) -> tuple[str, ...]:
    kept = [w.replace("-", " ") for w in words if w.lower() not in _RUDE and not has_synonym(w)]
    return tuple(dict.fromkeys(w for w in kept if w != name and len(w.split()) <= 3))


def plural(name: str) -> str:
    """Slices of pizza, cats, mice: the plural of the noun that a name is about."""
    words = name.split()
    end = next((i for i, word in enumerate(words) if i and word in _JOINTS), len(words))
    words[end - 1] = _plural(words[end - 1])
    return " ".join(words)


def _plural(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(("s", "x", "ch", "sh", "z")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def is_plural(name: str) -> bool:
    """Tell whether a name is already of several: "grapes", "two hearts"."""
    words = name.split()
    end = next((i for i, word in enumerate(words) if i and word in _JOINTS), len(words))
    head = words[end - 1]
    return head.endswith("s") and not head.endswith(("ss", "us", "is"))


def styled(described: str, style: str | None, random: "np.random.Generator") -> str:
    """A caption of a description that has its article, with the words of a style or without."""
    templates = STYLES.get(style or "", PLAIN)  # of other styles nothing is said
    bare = described
    for article in ("a ", "an "):
        bare = bare.removeprefix(article)
    template = templates[random.integers(len(templates))]
    return template.format(a=described, the=bare)


def article(text: str) -> str:
    """The text with "a" or "an" where it takes one."""
    return with_article(text)

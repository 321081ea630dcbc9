"""Captions that a person would type, from the names and keywords of Unicode CLDR."""

from collections.abc import Sequence

# What ends the noun that a name is about: "bowl | with spoon", "globe | showing Americas".
_JOINTS = frozenset(
    {"and", "at", "behind", "from", "in", "of", "on", "over", "showing", "with", "without"}
)
_BEINGS = frozenset({"boy", "child", "face", "girl", "man", "person", "woman"})
_BARE_FIRST = frozenset({"children", "hundred", "men", "no", "people", "two", "women"})
# Heads of names that are no countable thing. Plurals are found by their "s".
_UNCOUNTED = """
away bacon badminton bowling bread breast-feeding butter camping claim control cooking coral divide
dna fire fog foggy food garlic hockey ice infinity lacrosse laughing locked luggage lungs mate meat
minus money multiply plus pong popcorn prohibited racing radioactive registered rice rolling sake
salt soap spaghetti star-struck sushi thread unlocked voltage water wireless wood yarn zzz
"""
_BARE_HEADS = frozenset(_UNCOUNTED.split())
_SINGULAR_ENDS = ("ss", "us", "is", "os", "’s")
_SPOKEN_WITH_VOWEL = ("hour", "x-ray")
_SPOKEN_WITH_CONSONANT = ("euro", "ewe", "one", "uni", "use")


def phrase(name: str) -> str:
    """A CLDR short name as running text.

    "man: light skin tone, red hair" becomes "man with red hair and light skin tone".
    """
    head, _, rest = name.partition(": ")
    if not rest:
        return name
    parts = rest.split(", ")
    if head == "family":
        return f"family of {', '.join(parts)}"
    looks = [part for part in parts if part.endswith(("hair", "beard"))]
    if "bald" in parts:
        looks.append("no hair")
    looks += [part for part in parts if part.endswith("skin tone")]
    facing = [part for part in parts if part.startswith("facing")]
    others = [part for part in parts if part not in (*looks, *facing, "bald")]
    text = f"{head}, {' and '.join(others)}" if others else head
    text += f" with {' and '.join(looks)}" if looks else ""
    return ", ".join([text, *facing])


def with_article(text: str) -> str:
    """A bowl with spoon, an hourglass; but bread, grapes, Santa Claus."""
    words = text.replace(",", "").split()
    first = words[0]
    end = next((i for i, word in enumerate(words) if i and word in _JOINTS), len(words))
    head = words[end - 1].lower()
    proper = first.istitle() and first not in {"Christmas", "Japanese", "T-Rex"}
    plural = head.endswith("s") and not head.endswith(_SINGULAR_ENDS)
    time = head.endswith(("o’clock", "-thirty"))
    bare = plural or time or head in _BARE_HEADS
    if first in _BARE_FIRST or proper or (bare and first not in _BEINGS):
        return text
    return f"{_article(first.lower())} {text}"


def variants(text: str, keywords: Sequence[str], style: str) -> list[str]:
    """Captions of one picture, the plain one first: with and without the words of its style, with
    and without article, and with keywords that the text does not have already."""
    described = with_article(text)
    captions = [
        f"{style} emoji of {described}",
        f"{text}, {style} style",
        f"a {style} emoji of {described}",
        text,
        described,
    ]
    known = set(text.lower().replace(",", " ").split())
    new = [word for word in keywords if not known.issuperset(word.lower().split())]
    if new:
        captions += [f"{text}, {new[0]}, {style} style", f"{text}, {' '.join(new[:2])}"]
    if len(new) > 1:  # one keyword alone says too little
        tone = f" with {text.rpartition(' with ')[2]}" if text.endswith("skin tone") else ""
        captions.append(f"{' '.join(new[:4])}{tone}, {style} style")
    return list(dict.fromkeys(captions))


def _article(word: str) -> str:
    if word.startswith(_SPOKEN_WITH_VOWEL):
        return "an"
    return "an" if word[0] in "aeiou" and not word.startswith(_SPOKEN_WITH_CONSONANT) else "a"

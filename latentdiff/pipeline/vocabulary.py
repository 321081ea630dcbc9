"""What a model knows, told by the captions that its folder carries.

Two measures: the words that a text shares with a caption, and how near the model's own text encoder
puts them, by the cosine of their states at the end of the text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from latentdiff.bundle import Bundle
from latentdiff.data.wording import plural
from latentdiff.errors import warn

# The cosine below which a text without a word of any caption is far from all of them. Measured on
# the bundled model: docs/prompts.md.
_FAR = 0.4
_AT_ONCE = 256  # texts
_MOST = 5000  # captions that the text encoder is asked of, at a millisecond each
_WORD = re.compile(r"[^\W_]{2,}")
# What says nothing of the thing: joints, numbers, sizes, places, colours, pictures, styles.
_SMALL_WORDS = """
3d above an and as at background below beside big black blue bottom brown by corner drawing emoji
five flat for four from gray green grey her his icon image in into is it its large left little many
middle near next noto of off on one or orange over photo picture pink purple red render right side
small some style that the their this three tiny to top twemoji two under up white with without
yellow
"""
_SMALL = frozenset(_SMALL_WORDS.split())


def near(bundle: Bundle, text: str, count: int) -> list[str]:
    """The `count` captions of a model that are nearest to a text.

    The text itself comes first, if it is one; then those that share most words with it; among
    equals, and after them, those that the text encoder puts nearest. Where there are more than
    5,000, only so many are looked at: those that share most words, and of the others every n-th; a
    warning says so.
    """
    captions = bundle.captions
    asked = _forms(_telling(text) or _words(text))
    known = [
        (caption.casefold() == text.strip().casefold(), len(asked & _forms(_words(caption))))
        for caption in captions
    ]
    places = sorted(range(len(captions)), key=known.__getitem__, reverse=True)
    if len(places) > _MOST:
        warn(
            f"{bundle.name} has {len(places):,} captions; {_MOST:,} are looked at, those that "
            "share most words with the text and a sample of the others."
        )
        places = _fewer(places, sum(map(any, known)))
    few = replace(bundle, captions=tuple(captions[place] for place in places))
    close = dict(zip(places, cosines(few, [text])[0].tolist(), strict=True))
    order = sorted(places, key=lambda place: (*known[place], close[place]), reverse=True)
    return [captions[place] for place in order[:count]]


def _fewer(places: list[int], first: int) -> list[int]:
    """`_MOST` places at most: of the first ones as many as can be, of the others every n-th."""
    kept, rest = places[: min(first, _MOST)], places[first:]
    room = _MOST - len(kept)
    return [*kept, *rest[:: -(-len(rest) // room)]] if room and rest else kept


def far(bundle: Bundle, texts: Sequence[str], count: int = 3) -> Iterator[tuple[str, list[str]]]:
    """Each different text that is far from all captions of a model, and the nearest of them.

    It has words, none of them in a caption, and no caption is near it for the text encoder, which
    is asked only then: it takes about a millisecond a caption. A model without captions has none,
    nor has one with more than 5,000.
    """
    if not 0 < len(bundle.captions) <= _MOST:
        return
    known = _forms(word for caption in bundle.captions for word in _telling(caption))
    asked = {text: _forms(_telling(text)) for text in texts}
    strange = [text for text, words in asked.items() if words and not words & known]
    if not strange:
        return
    for text, close in zip(strange, cosines(bundle, strange), strict=True):
        best = close.topk(min(count, len(close)))
        if best.values[0] < _FAR:
            yield text, [bundle.captions[place] for place in best.indices.tolist()]


@torch.no_grad()
def cosines(bundle: Bundle, texts: Sequence[str]) -> Tensor:
    """How near each of N texts is to each of M captions of a model, -1 .. 1 [N, M]."""
    ends = normalize(_ends(bundle, [*texts, *bundle.captions]), dim=1)
    return ends[: len(texts)] @ ends[len(texts) :].T


def _ends(bundle: Bundle, texts: Sequence[str]) -> Tensor:
    """The states of the first text encoder at the ends of texts [N, D], float32 on the CPU.

    Texts of like length go through it together, without the padding behind the longest: no encoder
    here lets a text see what stands behind its end.
    """
    tower = next(iter(bundle.conditioner.towers.values()))
    tokens = tower.tokenize(texts)
    lengths = tokens.mask.sum(1)
    ends = torch.empty(len(texts), tower.width)
    for rows in lengths.argsort().split(_AT_ONCE):
        batch, longest = tokens.take(rows.tolist()), int(lengths[rows].max())
        batch = type(batch)(batch.ids[:, :longest], batch.mask[:, :longest], batch.cut)
        states = tower.states(batch).states.float().cpu()
        ends[rows] = states[torch.arange(len(rows)), lengths[rows] - 1]
    return ends


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.casefold()))


def _telling(text: str) -> set[str]:
    """The words of a text that say something of the thing."""
    return _words(text) - _SMALL


def _forms(words: Iterable[str]) -> set[str]:
    """Words as they are, and each as a plural."""
    words = set(words)
    return words | {plural(word) for word in words}

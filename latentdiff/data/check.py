"""Checks of the pictures of a folder: all faults are found and listed before a run starts."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from latentdiff.data.examples import Example, see_all
from latentdiff.errors import UserError, shown
from latentdiff.reading import half_character

Trouble = Literal["broken", "tiny", "duplicate", "garbled", "captionless"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A picture that cannot be trained on, with the reason as one readable line."""

    example: Example
    trouble: Trouble
    line: str


@dataclass(frozen=True, slots=True)
class Checked:
    """A folder's good pictures, and what is wrong with the others.

    Attributes:
        sizes: height and width in pixels of each example's picture.
    """

    examples: list[Example]
    sizes: list[tuple[int, int]]
    faults: list[Fault]

    @property
    def must_mend(self) -> bool:
        """Tell whether there is a fault other than duplicates, which lose nothing."""
        return any(fault.trouble != "duplicate" for fault in self.faults)

    def summary(self) -> str:
        """Count the faulty pictures by kind: "3 of 45 pictures (2 broken, 1 tiny)"."""
        counts = Counter(fault.trouble for fault in self.faults)
        kinds = ", ".join(f"{count} {trouble}" for trouble, count in counts.items())
        return f"{len(self.faults)} of {len(self.examples) + len(self.faults)} pictures ({kinds})"


def check_pictures(
    examples: Sequence[Example], least: int, *, prompt: str | None = None, progress: bool = True
) -> Checked:
    """Decode every picture, and tell the good ones from the others.

    Broken pictures cannot be decoded; tiny ones have a side below `least` pixels; of pictures that
    are the same to the pixel the first is kept, with the captions of all; the words of garbled ones
    cannot be read; captionless ones have none.

    Args:
        prompt: the caption of every picture, instead of its own.

    Raises:
        UserError: the prompt has half a character.
    """
    if prompt is not None:
        if half := half_character(prompt):
            raise UserError(f"the prompt has half a character ({half}): {prompt:.60}")
        examples = [replace(example, captions=(prompt,), fault="") for example in examples]
    examples = list(examples)
    results = see_all(examples, _look, "checking", progress=progress)
    faults: dict[int, Fault] = {}
    first: dict[str, int] = {}
    captions = [example.captions for example in examples]
    for number, (example, look) in enumerate(zip(examples, results, strict=True)):
        if isinstance(look, UserError):
            faults[number] = Fault(example, "broken", str(look))
        elif min(look.size) < least:
            height, width = look.size
            line = f"{shown(example.name)} is tiny: {width} x {height} pixels, below {least}"
            faults[number] = Fault(example, "tiny", line)
        elif (same := first.setdefault(look.digest, number)) != number:
            captions[same] += example.captions
            line = f"{shown(example.name)} is a duplicate of {shown(examples[same].name)}"
            if not example.captions:
                line += ", and its words cannot be read" * bool(example.fault)
                line += ", and has no caption" * (not example.fault)
            faults[number] = Fault(example, "duplicate", line)
    for number in first.values():
        example, own = examples[number], tuple(dict.fromkeys(captions[number]))
        if not own:
            faults[number] = _wordless(example)
        examples[number] = replace(example, captions=own)
    good = [number for number in range(len(examples)) if number not in faults]
    sizes = [look.size for look in (results[number] for number in good) if isinstance(look, Look)]
    return Checked([examples[n] for n in good], sizes, [faults[n] for n in sorted(faults)])


@dataclass(frozen=True, slots=True)
class Look:
    """Identity of a decoded picture: its height and width, and a digest of all pixels."""

    size: tuple[int, int]
    digest: str


def _look(number: int, image: Image.Image) -> Look:
    digest = hashlib.sha256(f"{image.size}".encode())
    digest.update(image.tobytes())
    return Look((image.height, image.width), digest.hexdigest())


def _wordless(example: Example) -> Fault:
    name = shown(example.name)
    if example.fault:
        return Fault(example, "garbled", shown(f"{name}: {example.fault}"))
    return Fault(example, "captionless", f"{name} has no caption")

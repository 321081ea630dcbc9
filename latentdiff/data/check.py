"""Checks of the pictures of a folder: all faults are found and listed before a run starts."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

from tqdm import tqdm

from latentdiff.data.examples import Example
from latentdiff.errors import UserError

Trouble = Literal["broken", "tiny", "duplicate", "captionless"]


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
    are the same to the pixel the first is kept; captionless ones have no words.

    Args:
        prompt: the caption of every picture, instead of its own.
    """
    if prompt is not None:
        examples = [replace(example, captions=(prompt,)) for example in examples]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looked = pool.map(_look, examples)
        shown = tqdm(
            looked, total=len(examples), desc="checking", disable=not progress, leave=False
        )
        results = list(shown)
    checked = Checked([], [], [])
    first: dict[str, Example] = {}
    for example, result in zip(examples, results, strict=True):
        if isinstance(result, str):
            fault = Fault(example, "broken", result)
        elif min(result[0]) < least:
            height, width = result[0]
            line = f"{example.name} is tiny: {width} x {height} pixels, below {least}"
            fault = Fault(example, "tiny", line)
        elif (same := first.setdefault(result[1], example)) is not example:
            line = f"{example.name} is a duplicate of {same.path.name}"
            fault = Fault(example, "duplicate", line)
        elif not example.captions:
            fault = Fault(example, "captionless", f"{example.name} has no caption")
        else:
            checked.examples.append(example)
            checked.sizes.append(result[0])
            continue
        checked.faults.append(fault)
    return checked


def _look(example: Example) -> tuple[tuple[int, int], str] | str:
    """Height and width, and a digest of all pixels; or why it cannot be opened."""
    try:
        image = example.open()
    except UserError as error:
        return str(error)
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    return (image.height, image.width), digest

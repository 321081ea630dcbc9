"""Prior preservation: pictures of the model's own, drawn before it is changed.

Ruiz et al. 2023, "DreamBooth", sec. 3.2, eq. 2.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from latentdiff.bundle import Bundle
from latentdiff.data.examples import Example
from latentdiff.files import make_folder
from latentdiff.learning.accumulate import in_parts
from latentdiff.learning.order import Stream, generator
from latentdiff.models.identity import weights_hash
from latentdiff.pictures import save_png

_AT_ONCE = 20

Draw = Callable[[list[str], list[int]], list[Image.Image]]
"""Prompts and a seed for each -> pictures."""


def drawn_from(bundle: Bundle) -> str:
    """A text that says of a model all that its pictures depend on."""
    process = bundle.process
    times = torch.linspace(process.t_min, process.t_max, 9, dtype=torch.float64)
    parts = [weights_hash(dict(zip(("alpha", "sigma"), process.alpha_sigma(times), strict=True)))]
    parts += [weights_hash(network.state_dict()) for network in bundle.modules.values()]
    return " ".join([*parts, bundle.prediction])


def prior_examples(folder: Path, prompts: Sequence[str], count: int, source: str) -> list[Example]:
    """List the files of `count` prior pictures, drawn or not yet, captioned by prompts in turn.

    Args:
        source: everything else that the pictures depend on, as text; it names their folder.
    """
    named = hashlib.sha256("\n".join([source, *prompts]).encode()).hexdigest()[:16]
    return [
        Example(folder / named / f"{number:05}.png", (prompts[number % len(prompts)],), {})
        for number in range(count)
    ]


def draw_missing(examples: Sequence[Example], seed: int, draw: Draw, *, progress: bool) -> int:
    """Draw those whose file is not there; returns how many.

    Raises:
        UserError: the folder cannot be written.
    """
    missing = [number for number, example in enumerate(examples) if not example.path.exists()]
    for folder in {examples[number].path.parent for number in missing}:
        make_folder(folder)
    bar = tqdm(total=len(missing), desc="prior pictures", disable=not progress, leave=False)

    def draw_some(numbers: Sequence[int]) -> list[Image.Image]:
        draws = [generator(seed, Stream.PRIOR, number, 0) for number in numbers]
        seeds = [int(draw.integers(2**32)) for draw in draws]
        return draw([examples[number].captions[0] for number in numbers], seeds)

    with bar:
        drawn = in_parts(missing, _AT_ONCE, draw_some)
        for number, picture in zip(missing, drawn, strict=True):
            save_png(picture, examples[number].path)
            bar.update()
    return len(missing)

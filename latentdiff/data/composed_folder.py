"""A folder of composed pictures beside the plain ones, for any training that reads folders."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from latentdiff.data.composition import (
    Composer,
    blaming_folder,
    plain_captions,
    read_rows,
    read_things,
)
from latentdiff.data.wordnet import WordNet
from latentdiff.errors import UserError
from latentdiff.files import make_folder, writing_folder
from latentdiff.pictures import encode_png
from latentdiff.random_numbers import philox

CAPTIONS = 8  # of each plain picture


def compose_folder(
    root: Path,
    out: Path,
    count: int,
    *,
    size: int = 128,
    seed: int = 0,
    wordnet: Path | None = None,
    skin_tones: bool = False,
    progress: bool = True,
) -> int:
    """Writes the plain pictures of the split `train` that have no skin tone, with many captions,
    and `count` pictures composed of them; returns how many there are of both.

    Args:
        root: a folder of single things as `latentdiff data emoji` writes them.
        out: a new folder. Its field `kind` says how each was made: see `composition.Kind`.
        wordnet: the folder of WordNet's `data.noun` and `index.noun`, for broader words.
        skin_tones: write those with a skin tone, too; none is composed of them.

    Raises:
        UserError: a file cannot be read, or lacks a field; `out` exists or cannot be written.
    """
    words = None if wordnet is None else WordNet(wordnet)
    with blaming_folder(root):
        rows = [row for row in read_rows(root) if skin_tones or not row["skin_tone"]]
        things, pictures, alphas = read_things(root, rows, words, size)
        bare = [at for at, row in enumerate(rows) if not row["skin_tone"]]
        if not bare:
            raise UserError(f"{root}: no picture is of the split `train` and without a skin tone")
        own = [replace(things[at], row=number) for number, at in enumerate(bare)]
        composer = Composer([rows[at] for at in bare], own, pictures[bare], alphas[bare], seed)
    make_folder(out.parent)
    with writing_folder(out, replace=False) as stage:
        (stage / "images").mkdir()
        lines: list[dict[str, object]] = []
        for number, (row, thing) in enumerate(zip(rows, things, strict=True)):
            told = plain_captions(row, thing, philox(seed, number), CAPTIONS)
            source = root / str(row["file_name"])
            name = f"images/plain_{number:06}{source.suffix}"
            shutil.copyfile(source, stage / name)
            captions = list(dict.fromkeys(told))
            lines.append({"file_name": name, "captions": captions, "kind": "plain"})
        for number in tqdm(range(count), desc="composed", disable=not progress):
            picture, caption, scene = composer.sample(number)
            lines.append(_written(stage, number, picture, caption, scene.kind))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (stage / "metadata.jsonl").write_text(text, "utf-8", newline="\n")
    return len(lines)


def _written(
    stage: Path, number: int, picture: np.ndarray, caption: str, kind: str
) -> dict[str, object]:
    """Writes one composed picture, uint8 [H, W, 3]; returns its line of metadata."""
    name = f"images/composed_{number:06}.png"
    (stage / name).write_bytes(encode_png(Image.fromarray(picture)))
    return {"file_name": name, "captions": [caption], "kind": kind}

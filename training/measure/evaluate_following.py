"""Measure how a model of the emoji follows what it is told, and draw the sheet a person looks at.

    python training/measure/evaluate_following.py --model runs/emoji128/model --data data/emoji128

Questions of eight kinds are drawn and judged by the generator's own truth, not by the trainer's
loss: colour and thing never put together in training, other words for a thing, training captions,
one to three of a thing, two things, and the held-out styles, tones and colours. `report.json` and
`sheet.webp` are left in OUT: sixteen pictures in a row, a band for each kind, at the end sixteen
prompts that were written down before any picture was seen.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff.data.composition import Composer, read_rows
from latentdiff.data.pool import read_all
from latentdiff.data.wordnet import WordNet
from latentdiff.files import make_folder, write_json, writing
from latentdiff.metrics.questions import Judge
from latentdiff.pictures import grid, to_pil
from latentdiff.pipeline import LatentDiffusionPipeline

GALLERY = (
    "a blue car", "a cat with sunglasses", "a pink elephant", "two red apples", "a sad robot",
    "a tree", "a cup of coffee", "a green dragon", "three yellow stars",
    "a small key in the corner",
    "a dog next to a house", "a purple octopus", "a hat above a face", "a kitten", "a fast car",
    "a birthday cake on a blue background",
)  # fmt: skip
"""Prompts that were chosen before any picture was seen."""

ROWS = 3  # of sixteen pictures, at most, that the sheet shows of a kind


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    data: Annotated[Path, typer.Option(help="Picture folder with metadata.jsonl.")],
    out: Annotated[Path, typer.Option(help="Where numbers and the sheet go.")] = Path(
        "runs/following"
    ),
    wordnet: Annotated[Path | None, typer.Option(help="Folder of data.noun.")] = None,
    most: Annotated[int, typer.Option(help="How much is asked: 120 pairs, twice the captions.")] = (
        120
    ),
    fast: Annotated[bool, typer.Option("--fast", help="By the LoRA of few steps.")] = False,
    solver: Annotated[str | None, typer.Option(help="Default: the model's own.")] = None,
    steps: Annotated[int | None, typer.Option(help="Default: the model's own.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of questions and noise.")] = 0,
) -> None:
    """Ask a model questions whose right answers are known."""
    make_folder(out)
    pipe = LatentDiffusionPipeline.from_pretrained(model, dtype="float32", fast=fast)
    steps, guidance_scale = pipe.bundle.settings(steps, "cfg", guidance_scale)
    judge = judge_of(data, wordnet, seed)

    def draw(prompts: list[str], own_seed: int = seed) -> Tensor:
        parts = [
            pipe(prompts[at : at + 20], num_inference_steps=steps, guidance_scale=guidance_scale,
                 solver=solver, seed=own_seed, first=at, output_type="pt", progress=False).images
            for at in tqdm(range(0, len(prompts), 20), unit="batch", leave=False)
        ]  # fmt: skip
        return torch.cat(parts) * 2 - 1

    asked = {
        "colour x thing": judge.coloured(), "synonyms": judge.synonyms(),
        "train": judge.captions("train", 2 * most), "counts": judge.counts(most // 3),
        "pairs": judge.pairs(most), "test_style": judge.captions("test_style", 4 * most),
        "test_tone": judge.captions("test_tone", 2 * most),
        "test_colour": judge.captions("test_colour", most),
    }  # fmt: skip
    used = {"solver": solver or pipe.bundle.solver, "steps": steps}
    report: dict[str, object] = {**used, "guidance_scale": guidance_scale, "seed": seed}
    tiles: list[Image.Image] = []
    for name, questions in asked.items():
        if not questions:
            continue
        drawn = draw([question.prompt for question in questions])
        marks = judge.right(drawn, questions)
        report[name] = {"of": len(questions)} | {
            kind: round(sum(own) / len(own), 4) for kind, own in marks.items()
        }
        print(f"{name}: {report[name]}", flush=True)
        tiles += band(drawn[: 16 * (1 if name.startswith("test") else ROWS)])
    report["diversity"] = round(judge.diversity(draw, most // 3), 4)
    print(f"diversity of seeds: {report['diversity']}")
    tiles += band(draw(list(GALLERY)))
    with writing(out / "sheet.webp", replace=True) as stage:
        grid(tiles, 16).save(stage, quality=88)
    write_json(out / "report.json", report, replace=True)


def judge_of(data: Path, wordnet: Path | None, seed: int) -> Judge:
    """The folder's pictures, and the things of its training part that are put together."""
    every = read_rows(data, None)
    words = None if wordnet is None else WordNet(wordnet)
    things, pictures, alphas = read_all(data, every, words, 128, 1)
    kept = [i for i, row in enumerate(every) if row["split"] == "train"]
    own = [replace(things[i], row=at) for at, i in enumerate(kept)]
    composer = Composer([every[i] for i in kept], own, pictures[kept], alphas[kept], seed)
    return Judge(every, things, pictures, alphas, composer, seed)


def band(drawn: Tensor) -> list[Image.Image]:
    """Pictures [N, 3, H, W] in [-1, 1] as tiles, filled up with white to whole rows of sixteen."""
    white = to_pil(torch.ones(3, *drawn.shape[2:]))
    return [to_pil(picture) for picture in drawn] + [white] * (-len(drawn) % 16)


if __name__ == "__main__":
    typer.run(main)

"""Measure a model on fixed prompts and seeds, and write the numbers into its card.

    python training/measure/evaluate.py --model assets/emoji128 --data data/emoji128 --styles noto

Per split: of the generated pictures, how many have as their nearest real picture (root mean square
of 32x32 blurred RGB, over all pictures of the folder) one of the emoji that was asked for; the
same for the training picture whose caption is nearest to the prompt, which is what copying would
score. For all: how near the nearest training picture is, so that copying is visible. The
autoencoder's PSNR is taken over the held-out pictures of the styles.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff.data.examples import Example, balanced_weights, load_pictures
from latentdiff.data.folder import check_fields, read_folder
from latentdiff.errors import UserError
from latentdiff.files import make_folder, write_json
from latentdiff.learning.batches import to_range
from latentdiff.learning.card import around, write_between
from latentdiff.metrics.nearest import blurred_thumbnails, nearest
from latentdiff.metrics.psnr import psnr
from latentdiff.pictures import grid, save_png, to_pil
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.random_numbers import philox

ALL_SPLITS = ("train", "test_style", "test_tone", "test_colour", "test_novel")
HELD_OUT = ("test_style", "test_novel", "test_colour", "test_struct")
START, END = (
    "<!-- evaluation: written by training/measure/evaluate.py -->",
    "<!-- end of evaluation -->",
)


class RealPictures:
    """Every picture of the folder: what a generated one is compared with."""

    def __init__(self, root: Path, size: int, styles: Sequence[str]) -> None:
        self.examples = read_folder(root)
        check_fields(self.examples, ("style", "split", "codepoints", "skin_tone"), root)
        self.pictures = load_pictures(self.examples, size)
        self.thumbnails = blurred_thumbnails(self.pictures)
        self.styles = set(styles)

    def numbers(self, split: str, untoned: bool = False) -> list[int]:
        """Places of one split's pictures in the evaluated styles."""
        return [
            number
            for number, example in enumerate(self.examples)
            if example.fields["split"] == split
            and example.fields["style"] in self.styles
            and not (untoned and example.fields["skin_tone"])
        ]

    def shows(self, thumbnails: Tensor, wanted: Sequence[Example]) -> list[bool]:
        """Tell for each thumbnail if its nearest real picture is the wanted emoji, in any style."""
        _, at = nearest(thumbnails, self.thumbnails)
        return [
            self.examples[int(number)].fields["codepoints"] == example.fields["codepoints"]
            for number, example in zip(at, wanted, strict=True)
        ]


def nearest_caption(prompt: str, captions: Sequence[tuple[int, frozenset[str]]]) -> int:
    """The picture whose caption shares most words with the prompt (Jaccard index)."""
    words = frozenset(prompt.lower().replace("-", " ").split())
    return max(captions, key=lambda item: len(words & item[1]) / len(words | item[1]))[0]


def draw(
    pipe: LatentDiffusionPipeline, prompts: list[str], steps: int, scale: float, seed: int
) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1], 20 at a time; picture i has stream i of the seed."""
    parts: list[Tensor] = []
    for first in tqdm(range(0, len(prompts), 20), desc="drawing", unit="x20"):
        made = pipe(
            prompts[first : first + 20],
            num_inference_steps=steps,
            guidance_scale=scale,
            seed=seed,
            first=first,
            output_type="pt",
            progress=False,
        )
        parts.append(made.images.cpu().float() * 2 - 1)
    return torch.cat(parts)


def measure_vae(pipe: LatentDiffusionPipeline, pictures: Tensor) -> float:
    """Mean PSNR in dB of the autoencoder's reconstructions (posterior mean) of uint8 pictures."""
    autoencoder, scores = pipe.bundle.autoencoder, list[Tensor]()
    for part in pictures.split(32):
        real = to_range(part)
        with torch.no_grad():
            fake = autoencoder.decode(autoencoder.encode(real)).clamp(-1, 1)
        scores.append(psnr(real, fake.cpu()))
    return float(torch.cat(scores).mean())


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = Path("assets/emoji128"),
    data: Annotated[Path, typer.Option(help="Picture folder.")] = Path("data/emoji128"),
    styles: Annotated[
        str, typer.Option(help="Styles the model was trained on, a comma between.")
    ] = ("noto"),
    out: Annotated[Path, typer.Option(help="Where grids and numbers go.")] = Path(
        "runs/evaluation"
    ),
    count: Annotated[int, typer.Option(help="How many training captions.")] = 200,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Seed of prompts and noise.")] = 0,
    splits: Annotated[
        str | None,
        typer.Option(help=f"Whose captions are drawn. Default: {','.join(ALL_SPLITS)}."),
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA to measure the model with.")] = None,
    lora_scale: Annotated[float, typer.Option(help="Strength of the LoRA.")] = 1.0,
    card: Annotated[bool, typer.Option(help="Write the numbers into MODEL/README.md.")] = True,
) -> None:
    """Measure a model on fixed prompts and seeds."""
    try:
        card = card and lora is None
        if card:
            around(model / "README.md", START, END)  # before the work
        pipe = LatentDiffusionPipeline.from_pretrained(model)
        if lora is not None:
            pipe.load_lora(lora, lora_scale)
        chosen = None if splits is None else splits.split(",")
        text = evaluate(
            pipe, data, styles.split(","), chosen, out, count, steps, guidance_scale, seed
        )
        if card:
            write_between(model / "README.md", START, END, text)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def evaluate(
    pipe: LatentDiffusionPipeline,
    data: Path,
    styles: list[str],
    chosen: list[str] | None,
    out: Path,
    count: int,
    steps: int,
    scale: float,
    seed: int,
) -> str:
    """Every number, a grid per split, `evaluation.json`; returns the card's section."""
    real = RealPictures(data, pipe.bundle.size[0], styles)
    chosen = choose_splits(real, chosen)
    make_folder(out)
    seen = real.numbers("train", untoned=True)
    training = [(n, _words(real.examples[n].captions[0])) for n in seen]
    held_out = [n for split in HELD_OUT for n in real.numbers(split, untoned=True)]
    report: dict[str, object] = {
        "model": pipe.bundle.name,
        "steps": steps,
        "guidance_scale": scale,
        "seed": seed,
        "styles": styles,
        "vae_pictures": len(held_out),
    }
    if held_out:
        report["vae_psnr_db"] = round(measure_vae(pipe, real.pictures[held_out]), 2)
    splits: dict[str, dict[str, float]] = {}
    for split in chosen:
        numbers = choose(real, seen, count, seed) if split == "train" else real.numbers(split)
        splits[split] = measure(
            pipe, real, numbers, training, out / f"{split}.png", steps, scale, seed
        )
        typer.echo(f"{split}: {splits[split]}")
    report["splits"] = splits
    write_json(out / "evaluation.json", report, replace=True)
    text = table(report, splits)
    typer.echo(text)
    return text


def choose_splits(real: RealPictures, asked: list[str] | None) -> list[str]:
    """Choose the splits: those asked for, or all of `ALL_SPLITS` that have pictures.

    Raises:
        UserError: a split that was asked for has no pictures, or "train" none without a skin tone.
    """
    there = {str(e.fields["split"]) for e in real.examples if str(e.fields["style"]) in real.styles}
    told = f"of the styles {', '.join(sorted(real.styles))} there are {sorted(there)}"
    if missing := [split for split in asked or () if split not in there]:
        raise UserError(f"no picture is of the split {missing[0]!r}; {told}")
    if not real.numbers("train", untoned=True):
        raise UserError(f"no picture without a skin tone is of the split 'train'; {told}")
    return asked or [split for split in ALL_SPLITS if split in there]


def choose(real: RealPictures, numbers: list[int], count: int, seed: int) -> list[int]:
    """Training pictures to ask for: without repeats, balanced over (style, emoji)."""
    weights = balanced_weights([real.examples[n] for n in numbers], ("style", "base"))
    picked = philox(seed, 5).choice(
        len(numbers), min(count, len(numbers)), replace=False, p=weights
    )
    return [numbers[int(place)] for place in picked]


def measure(
    pipe: LatentDiffusionPipeline,
    real: RealPictures,
    numbers: list[int],
    training: list[tuple[int, frozenset[str]]],
    picture: Path,
    steps: int,
    scale: float,
    seed: int,
) -> dict[str, float]:
    """One split: draw every first caption, compare, and save the first 40 with the real ones."""
    wanted = [real.examples[number] for number in numbers]
    prompts = [example.captions[0] for example in wanted]
    drawn = draw(pipe, prompts, steps, scale, seed)
    thumbnails = blurred_thumbnails(drawn)
    copies = [nearest_caption(prompt, training) for prompt in prompts]
    far, _ = nearest(thumbnails, real.thumbnails[[number for number, _ in training]])
    save_png(pairs(drawn[:40], real.pictures[numbers[:40]]), picture, replace=True)
    return {
        "prompts": len(numbers),
        "shows_asked": _share(real.shows(thumbnails, wanted)),
        "nearest_caption_shows_asked": _share(real.shows(real.thumbnails[copies], wanted)),
        "distance_to_training_median": round(float(far.median()), 4),
        "distance_to_training_least": round(float(far.min()), 4),
    }


def pairs(drawn: Tensor, real: Tensor) -> Image.Image:
    """Rows of ten drawn pictures, each above a row of the real ones."""
    tiles: list[Image.Image] = []
    for above, below in zip(drawn.split(10), to_range(real).split(10), strict=True):
        for row in (above, below):
            blank = [torch.ones_like(row[0])] * (10 - len(row))
            tiles += [to_pil(picture) for picture in (*row, *blank)]
    return grid(tiles, 10)


def table(report: dict[str, object], splits: dict[str, dict[str, float]]) -> str:
    """The numbers as Markdown."""
    lines = [
        f"{report['steps']} steps, guidance {report['guidance_scale']}, seed {report['seed']}."
        + (
            f" Autoencoder: PSNR {report['vae_psnr_db']} dB over {report['vae_pictures']} held-out "
            "pictures."
            if "vae_psnr_db" in report
            else ""
        ),
        "",
        "| prompts from | how many | shows the asked emoji | nearest-caption training picture does "
        "| distance to the nearest training picture: median | least |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['prompts']} | {row['shows_asked']:.1%} | "
        f"{row['nearest_caption_shows_asked']:.1%} | {row['distance_to_training_median']} | "
        f"{row['distance_to_training_least']} |"
        for name, row in splits.items()
    ]
    return "\n".join(lines)


def _words(caption: str) -> frozenset[str]:
    return frozenset(caption.lower().replace("-", " ").split())


def _share(hits: Sequence[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


if __name__ == "__main__":
    typer.run(main)

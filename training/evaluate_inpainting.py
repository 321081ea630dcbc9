"""Measure RePaint against plain replacement on held-out pictures.

    python training/evaluate_inpainting.py --model assets/emoji64 --data data/emoji128

Each picture gets one hole, a box of a quarter of its area at a random place, and each method fills
it from the same prompt and seed. Told for each: the distance of the whole to the original in
normalised features (of a fixed random network; or LPIPS, with --features FILE), and the seam: by
how much the gradient across the border of the hole exceeds the mean of those on its two sides. The
seam is told of the model's own pictures, the known pixels put back without any smoothing, too.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff.data.folder import Example, read_folder
from latentdiff.editing import Blend, RePaint
from latentdiff.errors import UserError
from latentdiff.learning.order import generator
from latentdiff.models import perceptual
from latentdiff.pictures import centre_square, grid, open_picture, save_png, to_tensor
from latentdiff.pipeline import LatentDiffusionPipeline


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = Path("assets/emoji64"),
    data: Annotated[Path, typer.Option(help="Picture folder.")] = Path("data/emoji128"),
    styles: Annotated[str, typer.Option(help="Of the held-out pictures.")] = "noto",
    out: Annotated[Path, typer.Option(help="A new file for pictures.")] = Path(
        "runs/evaluation/inpainting.png"
    ),
    count: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 100,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Of the run.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="1 is off.")] = 4.0,
    resamples: Annotated[int, typer.Option(min=1, help="RePaint's.")] = 10,
    features: Annotated[str, typer.Option(help="random, or an LPIPS safetensors file.")] = "random",
    seed: Annotated[int, typer.Option(help="Of pictures, holes and noise.")] = 0,
) -> None:
    """Measure RePaint against plain replacement on held-out pictures."""
    try:
        pipe = LatentDiffusionPipeline.from_pretrained(model)
        wanted = held_out(data, styles.split(","), count, seed)
        measure(pipe, wanted, out, steps, guidance_scale, resamples, features, seed)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def held_out(data: Path, styles: list[str], count: int, seed: int) -> list[Example]:
    """Pictures that the model was not trained on, chosen by the seed."""
    found = [
        example
        for example in read_folder(data, where={"style": tuple(styles)})
        if str(example.fields.get("split", "")).startswith("test")
    ]
    if not found:
        raise UserError(f"{data} has no held-out pictures of the styles {', '.join(styles)}.")
    order = generator(seed, 6).permutation(len(found))[:count]
    return [found[int(place)] for place in order]


def measure(
    pipe: LatentDiffusionPipeline,
    wanted: list[Example],
    out: Path,
    steps: int,
    scale: float,
    resamples: int,
    features: str,
    seed: int,
) -> None:
    """Print the table; save the first ten pictures: original, hole, plain, RePaint."""
    distance = perceptual.create(features)
    side = pipe.bundle.size[0]
    scores: dict[str, list[tuple[float, float, float]]] = {"plain": [], "RePaint": []}
    rows: list[Image.Image] = []
    for place, example in enumerate(tqdm(wanted, desc="inpainting")):
        picture = centre_square(open_picture(example.path), side)
        mask = hole(side, generator(seed, 7, place))
        rows += [picture, Image.composite(Image.new("RGB", picture.size, "grey"), picture, mask)]
        edits = {"plain": Blend(picture, mask), "RePaint": RePaint(picture, mask, None, resamples)}
        for name, edit in edits.items():
            output = pipe(
                example.captions[0],
                edits=[edit],
                num_inference_steps=steps,
                guidance_scale=scale,
                seed=seed,
                first=place,
                progress=False,
            )
            original, result = to_tensor(picture)[None], to_tensor(output.images[0])[None]
            with torch.no_grad():
                own = pipe.bundle.decode(output.latents).cpu().clamp(-1, 1)
                raw = torch.where(mask_of(mask), own, original)
                far = float(distance(result, original))
            scores[name].append((far, seam(result, mask_of(mask)), seam(raw, mask_of(mask))))
            rows.append(output.images[0])
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid(rows[:40], 8), out)
    typer.echo(table(scores, steps, scale, resamples))


def hole(side: int, random: np.random.Generator) -> Image.Image:
    """A white square of a quarter of the area, off the edge."""
    pixels = np.zeros((side, side), dtype=np.uint8)
    top, left = random.integers(1, side - side // 2, 2)
    pixels[top : top + side // 2, left : left + side // 2] = 255
    return Image.fromarray(pixels)


def mask_of(mask: Image.Image) -> Tensor:
    """[1, 1, H, W] bool, True in the hole."""
    return torch.from_numpy(np.array(mask) > 0)[None, None]


def seam(picture: Tensor, inside: Tensor) -> float:
    """How much the gradient across the border of the hole exceeds those beside it, on the mean.

    Args:
        picture: [1, 3, H, W] in [-1, 1].
        inside: [1, 1, H, W] bool.
    """
    excess: list[Tensor] = []
    for turned, hidden in ((picture, inside), (picture.mT, inside.mT)):
        step = turned.diff(dim=-1)
        border = (hidden[..., 1:-2] != hidden[..., 2:-1]).expand_as(step[..., 1:-1])
        beside = (step[..., :-2] + step[..., 2:]) / 2
        excess.append((step[..., 1:-1] - beside).abs()[border])
    return float(torch.cat(excess).mean())


def table(
    scores: dict[str, list[tuple[float, float, float]]], steps: int, scale: float, resamples: int
) -> str:
    """The means as Markdown, and in how many pictures RePaint's number is the smaller."""
    count = len(scores["plain"])
    lines = [
        f"{count} held-out pictures, {steps} steps, guidance {scale}, {resamples} resamples.",
        "",
        "| | feature distance | seam | seam before pasting |",
        "|---|---|---|---|",
    ]
    for name, rows in scores.items():
        means = np.mean(rows, axis=0)
        lines.append(f"| {name} | " + " | ".join(f"{mean:.4f}" for mean in means) + " |")
    better = np.mean(np.array(scores["RePaint"]) < np.array(scores["plain"]), axis=0)
    lines.append("| RePaint better in | " + " | ".join(f"{one:.0%}" for one in better) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)

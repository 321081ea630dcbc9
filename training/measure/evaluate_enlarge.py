"""Measure an upscaling model beside Lanczos's filter on held-out pictures.

    python training/measure/evaluate_enlarge.py --model runs/emoji128-enlarge/model

Each picture of no training split is made as large as the model draws, and as small as it sees, both
by Pillow's Lanczos filter from the file itself. Told of Lanczos's enlargement and of the model's:

- the distance to the large picture in normalised features, of a fixed random network or (with
  --features FILE) of LPIPS, and the PSNR to it;
- the PSNR of the result, shrunk again, to the small picture.

Then the large pictures are enlarged themselves, once in windows of the model's own size and once as
a whole. Told of each is the seam: the mean difference of pixels across the borders of the windows,
over that across lines near them. Lines are compared whose distance is a multiple of the factor of
the autoencoder, which treats pixels of one block otherwise than those of two.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import Tensor

from latentdiff.data.folder import held_out
from latentdiff.editing import Enlarge, TiledDiffusion
from latentdiff.editing.tiled_diffusion import window_starts
from latentdiff.errors import UserError
from latentdiff.files import make_folder, write_json
from latentdiff.metrics import perceptual
from latentdiff.metrics.psnr import psnr
from latentdiff.pictures import centre_square, grid, save_png, to_tensor
from latentdiff.pipeline import LatentDiffusionPipeline

_AT_ONCE = 10
_SHOWN = 8


def main(
    model: Annotated[Path, typer.Option(metavar="FOLDER", help="An upscaling model.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Pictures.")] = Path("data/emoji128"),
    count: Annotated[int, typer.Option(min=1, help="Pictures, evenly from those held out.")] = 100,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")] = 8,
    solver: Annotated[str | None, typer.Option(help="Solver; the model's own.")] = None,
    noise_level: Annotated[int, typer.Option(min=0, help="Noise on the small picture.")] = 0,
    hold: Annotated[bool, typer.Option(help="Hold the result to the small picture.")] = True,
    seams: Annotated[int, typer.Option(min=0, help="Pictures to measure seams on.")] = 10,
    features: Annotated[str, typer.Option(help="random, or an LPIPS safetensors file.")] = "random",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where sheet and numbers go.")] = Path(
        "runs/enlarge-evaluation"
    ),
) -> None:
    """Measure an upscaling model beside Lanczos's filter."""
    try:
        pipe = LatentDiffusionPipeline.from_pretrained(model)
        low = pipe.bundle.network.low_resolution
        if low is None:
            raise UserError(f"{model} enlarges no pictures.")
        side = min(pipe.bundle.size)
        examples = held_out(data, count)
        large = [centre_square(example.open(), side) for example in examples]
        small = [centre_square(example.open(), side // low.ratio) for example in examples]
        call = {"num_inference_steps": steps, "solver": solver, "seed": seed}
        edit = {"noise_level": noise_level, "hold": hold}
        began = time.perf_counter()
        drawn = enlarged(pipe, small, edit, call)
        seconds = (time.perf_counter() - began) / len(small)
        lanczos = [one.resize((side, side), Image.Resampling.LANCZOS) for one in small]
        told = perceptual.create(features)
        report: dict[str, Any] = {"pictures": len(small), **call, **edit, "features": features}
        report |= {"seconds a picture": round(seconds, 3)}
        report |= {"Lanczos": compared(told, lanczos, large, small)}
        report |= {"model": compared(told, drawn, large, small)}
        if seams:
            report |= {"seams": seams_of(pipe, large[:seams], edit, call)}
        make_folder(out)
        write_json(out / "enlarge.json", report, replace=True)
        rows = [pictures[:_SHOWN] for pictures in (lanczos, drawn, large)]
        every = [rows[row][column] for column in range(len(rows[0])) for row in range(3)]
        save_png(grid(every, 6), out / "enlarge.png", replace=True)
        for name in ("Lanczos", "model", "seams"):
            typer.echo(f"{name}: {report.get(name)}")
        change = 1 - report["model"]["distance"] / report["Lanczos"]["distance"]
        typer.echo(f"{100 * change:.1f} % below Lanczos in distance, {seconds:.2f} s a picture")
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def enlarged(
    pipe: LatentDiffusionPipeline,
    small: Sequence[Image.Image],
    edit: dict[str, Any],
    call: dict[str, Any],
    *windows: TiledDiffusion,
) -> list[Image.Image]:
    """What the model makes of pictures of one size, without words."""
    drawn: list[Image.Image] = []
    for first in range(0, len(small), _AT_ONCE):
        part = torch.stack([to_tensor(one) for one in small[first : first + _AT_ONCE]])
        more = {"num_images_per_prompt": len(part), "guidance_scale": 1.0, "progress": False}
        edits = [Enlarge(part, **edit), *windows]
        drawn += pipe("", edits=edits, first=first, **more, **call).images
    return drawn


def compared(
    distance: torch.nn.Module,
    drawn: Sequence[Image.Image],
    large: Sequence[Image.Image],
    small: Sequence[Image.Image],
) -> dict[str, float]:
    """Means of the distance and the PSNR to the large pictures, and the PSNR of what is shrunk."""
    told: dict[str, list[float]] = {"distance": [], "psnr": [], "psnr shrunk": []}
    for one, wanted, shown in zip(drawn, large, small, strict=True):
        shrunk = one.resize(shown.size, Image.Resampling.LANCZOS)
        a, b, c, d = (to_tensor(image)[None] for image in (one, wanted, shrunk, shown))
        told["distance"].append(float(distance(a, b)))
        told["psnr"].append(float(psnr(a, b)))
        told["psnr shrunk"].append(float(psnr(c, d)))
    means = {name: round(sum(values) / len(values), 4) for name, values in told.items()}
    return means | {"least psnr shrunk": round(min(told["psnr shrunk"]), 2)}


def seams_of(
    pipe: LatentDiffusionPipeline,
    pictures: Sequence[Image.Image],
    edit: dict[str, Any],
    call: dict[str, Any],
) -> dict[str, float]:
    """Means of the seam of pictures that are larger than a window, in windows and as a whole."""
    bundle, windows = pipe.bundle, TiledDiffusion()
    ratio = bundle.network.low_resolution.ratio  # pyright: ignore[reportOptionalMemberAccess]
    borders: list[list[int]] = []
    for side, window in zip(pictures[0].size[::-1], bundle.network.native_size, strict=True):
        latents = side * ratio // bundle.factor
        starts = window_starts(latents, min(window, latents), windows.overlap)
        edges = set(starts) | {start + window for start in starts}
        borders.append(sorted((edge * bundle.factor) for edge in edges if 0 < edge < latents))
    told: dict[str, float] = {}
    for name, used in (("in windows", (windows,)), ("as a whole", ())):
        drawn = enlarged(pipe, pictures, edit, call, *used)
        seen = torch.stack([to_tensor(one) for one in drawn])
        told[name] = round(seam(seen, borders[0], borders[1], bundle.factor), 4)
    return told


def seam(pictures: Tensor, rows: Sequence[int], columns: Sequence[int], factor: int) -> float:
    """The mean difference across lines, over that across lines 1 and 2 factors beside them.

    Args:
        pictures: [B, 3, H, W].
        rows: a line lies between this row and the one above it.
        columns: likewise.
        factor: of the autoencoder.
    """
    on: list[Tensor] = []
    near: list[Tensor] = []
    for lines, turned in ((rows, pictures), (columns, pictures.transpose(-1, -2))):
        steps = turned.diff(dim=-2).abs().mean((0, 1, 3))  # [H - 1]: between row k and k + 1
        for line in lines:
            on.append(steps[line - 1])
            beside = [line - 1 + factor * k for k in (-2, -1, 1, 2)]
            near += [steps[place] for place in beside if 0 <= place < len(steps)]
    return float(torch.stack(on).mean() / torch.stack(near).mean())


if __name__ == "__main__":
    typer.run(main)

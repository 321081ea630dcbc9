"""Measure RePaint against plain replacement on held-out pictures.

    python training/measure/evaluate_inpainting.py --model assets/emoji128 --data data/emoji128

With `--card docs/editing.md` the tables go into the how-to.

The pictures are those of the style that no stage of training saw, skin tones left out, as the
bundled model knows none. Each gets one hole: a box in the middle, one half, or brush strokes, in
turn. The methods fill it from the same prompt and the same streams of noise. Told for each:

- the distance of the result to the original in normalised features, of a fixed random network or
  (with --features FILE) of LPIPS;
- the seam: by how much the gradient across the border of the hole exceeds the mean of those on its
  two sides; and the same before the known pixels were pasted back smoothly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from latentdiff.bundle import Precision
from latentdiff.data.examples import Example
from latentdiff.data.folder import read_folder
from latentdiff.diffusion.sampling import Edit
from latentdiff.editing import Blend, RePaint, RunContext
from latentdiff.editing.run_context import Finish
from latentdiff.errors import UserError
from latentdiff.files import make_folder
from latentdiff.learning.card import around, write_between
from latentdiff.metrics import perceptual
from latentdiff.pictures import centre_square, grid, save_png, to_pil, to_tensor
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.random_numbers import philox

START = "<!-- measured: written by training/measure/evaluate_inpainting.py -->"
END = "<!-- end of measured -->"
SHOWN = 10  # pictures in the sheet


@dataclass(frozen=True, slots=True)
class Run:
    """Settings shared by all methods."""

    steps: int
    guidance_scale: float
    solver: str
    resamples: int
    seed: int


@dataclass(frozen=True, slots=True)
class Case:
    """One picture with a hole, encoded without what is in it.

    Attributes:
        kind: the kind of hole.
        latents: [1, C, h, w].
        mask: [1, 1, h, w], 1 where to paint.
        finish: pastes the known pixels back.
    """

    prompt: str
    picture: Image.Image
    hole: Image.Image
    kind: str
    latents: Tensor
    mask: Tensor
    finish: Finish


Method = tuple[Callable[[Tensor, Tensor], Edit], int]
"""(latents, mask) -> edit, and the steps of its run."""


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = Path("assets/emoji128"),
    data: Annotated[Path, typer.Option(help="Picture folder.")] = Path("data/emoji128"),
    styles: Annotated[str, typer.Option(help="Style of the held-out pictures.")] = "noto",
    out: Annotated[Path, typer.Option(help="A new file for pictures.")] = Path(
        "runs/evaluation/inpainting.png"
    ),
    card: Annotated[Path | None, typer.Option(help="Where the table goes too.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 100,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")] = 20,
    guidance_scale: Annotated[
        float, typer.Option(help="Classifier-free guidance; 1 is off.")
    ] = 1.0,
    solver: Annotated[str, typer.Option(help="Solver; the paper uses ddpm.")] = "ddpm",
    resamples: Annotated[int, typer.Option(min=2, help="RePaint's resampling steps.")] = 5,
    features: Annotated[str, typer.Option(help="random, or an LPIPS safetensors file.")] = "random",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of pictures, holes and noise.")] = 0,
) -> None:
    """Measure RePaint against plain replacement on held-out pictures."""
    try:
        if card is not None:
            around(card, START, END)  # before the work
        if out.exists():
            raise UserError(f"{out} already exists: choose another name")
        precision: Precision = dtype  # pyright: ignore[reportAssignmentType]: checked by the loader
        pipe = LatentDiffusionPipeline.from_pretrained(model, dtype=precision)
        run = Run(steps, guidance_scale, solver, resamples, seed)
        wanted = held_out(data, styles.split(","), count, seed)
        cases = [prepare(pipe, example, place, seed) for place, example in enumerate(wanted)]
        text = measure(pipe, cases, run, out, features)
        typer.echo(text)
        if card is not None:
            write_between(card, START, END, text)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def held_out(data: Path, styles: list[str], count: int, seed: int) -> list[Example]:
    """Pictures without skin tones that the model was not trained on, chosen by the seed."""
    found = [
        example
        for example in read_folder(data, where={"style": tuple(styles)})
        if str(example.fields.get("split", "")).startswith("test")
        and not example.fields.get("skin_tone")
    ]
    if not found:
        raise UserError(f"{data} has no held-out pictures of the styles {', '.join(styles)}.")
    order = philox(seed, 6).permutation(len(found))[:count]
    return [found[int(place)] for place in order]


@torch.no_grad()
def prepare(pipe: LatentDiffusionPipeline, example: Example, place: int, seed: int) -> Case:
    """A picture, its hole, and both on latents."""
    bundle = pipe.bundle
    side = bundle.size[0]
    picture = centre_square(example.open(), side)
    kind = list(HOLES)[place % len(HOLES)]
    mask = HOLES[kind](side, philox(seed, 7, place))
    context = RunContext(side, side, bundle.autoencoder)
    bound, finish = Blend(picture, mask).bind(context)
    assert isinstance(bound.image, Tensor)
    assert isinstance(bound.mask, Tensor)
    return Case(example.captions[0], picture, mask, kind, bound.image, bound.mask, finish)


def box(side: int, random: np.random.Generator) -> Image.Image:
    """A square of a quarter of the area, at most a quarter of a side off the middle."""
    left, top = (int(at) for at in random.integers(side // 8, side - side // 2 - side // 8, 2))
    return _drawn(side, (left, top, left + side // 2 - 1, top + side // 2 - 1))


def half(side: int, random: np.random.Generator) -> Image.Image:
    """One of the four halves."""
    whole, middle = side - 1, side // 2
    halves = [
        (0, 0, middle - 1, whole),
        (middle, 0, whole, whole),
        (0, 0, whole, middle - 1),
        (0, middle, whole, whole),
    ]
    return _drawn(side, halves[int(random.integers(4))])


def brush(side: int, random: np.random.Generator) -> Image.Image:
    """Three strokes of a sixth of a side."""
    mask = Image.new("L", (side, side), 0)
    pen, width = ImageDraw.Draw(mask), side // 6
    for _ in range(3):
        x0, y0, x1, y1 = (int(at) for at in random.integers(side // 8, side - side // 8, 4))
        pen.line((x0, y0, x1, y1), fill=255, width=width)
        for x, y in ((x0, y0), (x1, y1)):
            pen.circle((x, y), width // 2, fill=255)
    return mask


HOLES = {"box": box, "half": half, "brush": brush}


def _drawn(side: int, rectangle: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).rectangle(rectangle, fill=255)
    return mask


def measure(
    pipe: LatentDiffusionPipeline, cases: list[Case], run: Run, out: Path, features: str
) -> str:
    """The tables; and a sheet of the first pictures: original, hole, Blend, RePaint."""
    jumping = RePaint(cases[0].latents, cases[0].mask, None, run.resamples)
    levels = jumping.timetable(pipe.bundle.timetable(None, run.steps))
    calls = sum(there.log_snr > here.log_snr for here, there in pairwise(levels))
    methods: dict[str, Method] = {
        "Blend": (Blend, run.steps),
        "RePaint": (lambda x, mask: RePaint(x, mask, None, run.resamples), run.steps),
        f"Blend, {calls} steps": (Blend, calls),
    }
    distance = perceptual.create(features)
    scores: dict[str, np.ndarray] = {}
    nfe: dict[str, int] = {}
    drawn: dict[str, list[Image.Image]] = {}
    for name, method in methods.items():
        made, nfe[name] = fill_all(pipe, cases, run, method, name)
        scores[name] = np.array(
            [judge(case, one, distance) for case, one in zip(cases, made, strict=True)]
        )
        drawn[name] = [to_pil(finished(case, made[at])) for at, case in enumerate(cases[:SHOWN])]
    rows: list[Image.Image] = []
    for at, case in enumerate(cases[:SHOWN]):
        grey = Image.new("RGB", case.picture.size, "grey")
        shown = Image.composite(grey, case.picture, case.hole)
        rows += [case.picture, shown, drawn["Blend"][at], drawn["RePaint"][at]]
    make_folder(out.parent)
    save_png(grid(rows, 8), out)
    return table(cases, scores, nfe, run, str(pipe.bundle.network.dtype).removeprefix("torch."))


@torch.no_grad()
def fill_all(
    pipe: LatentDiffusionPipeline, cases: list[Case], run: Run, method: Method, name: str
) -> tuple[list[Tensor], int]:
    """Pictures [1, 3, H, W] before anything is pasted back; and calls of the U-Net."""
    make, steps = method
    made: list[Tensor] = []
    nfe = 0
    for first in tqdm(range(0, len(cases), 25), desc=name, unit="x25"):
        part = cases[first : first + 25]
        edit = make(torch.cat([one.latents for one in part]), torch.cat([one.mask for one in part]))
        output = pipe(
            [one.prompt for one in part],
            edits=[edit],
            num_inference_steps=steps,
            guidance_scale=run.guidance_scale,
            solver=run.solver,
            seed=run.seed,
            first=first,
            output_type="latent",
            progress=False,
        )
        nfe = output.nfe
        made += pipe.bundle.autoencoder.decode(output.latents).cpu().float().split(1)
    return made, nfe


def finished(case: Case, made: Tensor) -> Tensor:
    """[1, 3, H, W] -> [3, H, W] in [-1, 1], the known pixels pasted back."""
    return case.finish(made).clamp(-1, 1)[0]


@torch.no_grad()
def judge(
    case: Case, made: Tensor, distance: perceptual.FeatureDistance
) -> tuple[float, float, float]:
    """Feature distance of the result, its seam, and the seam before pasting."""
    original, result = to_tensor(case.picture)[None], finished(case, made)[None]
    inside = torch.from_numpy(np.array(case.hole) > 0)[None, None]
    raw = torch.where(inside, made.clamp(-1, 1), original)
    return float(distance(result, original)), seam(result, inside), seam(raw, inside)


def seam(picture: Tensor, inside: Tensor) -> float:
    """Measure a seam: the mean excess of the gradient across the hole's border over its neighbours.

    Args:
        picture: [1, 3, H, W] in [-1, 1].
        inside: [1, 1, H, W] bool, True in the hole.
    """
    excess: list[Tensor] = []
    for turned, hidden in ((picture, inside), (picture.mT, inside.mT)):
        step = turned.diff(dim=-1)
        border = (hidden[..., 1:-2] != hidden[..., 2:-1]).expand_as(step[..., 1:-1])
        beside = (step[..., :-2] + step[..., 2:]) / 2
        excess.append((step[..., 1:-1] - beside).abs()[border])
    return float(torch.cat(excess).mean())


def table(
    cases: list[Case], scores: dict[str, np.ndarray], nfe: dict[str, int], run: Run, dtype: str
) -> str:
    """The means as Markdown, and what RePaint gains over Blend, picture by picture."""
    lines = [
        f"{len(cases)} held-out pictures; {run.steps} steps of `{run.solver}`, guidance "
        f"{run.guidance_scale:g}, {run.resamples} resamples, {dtype}, seed {run.seed}. Less is "
        "better; behind ± is one standard error.",
        "",
        "| | network calls | feature distance | seam | seam before pasting |",
        "|---|---|---|---|---|",
    ]
    for name, rows in scores.items():
        means = " | ".join(f"{mean:.4f}" for mean in rows.mean(0))
        lines.append(f"| {name} | {nfe[name]} | {means} |")
    gaps = scores["RePaint"] - scores["Blend"]
    errors = gaps.std(0, ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else gaps[0] * np.nan
    told = [f"{gap:+.4f} ± {error:.4f}" for gap, error in zip(gaps.mean(0), errors, strict=True)]
    lines.append(f"| RePaint - Blend | | {' | '.join(told)} |")
    shares = " | ".join(f"{share:.0%}" for share in (gaps < 0).mean(0))
    lines += [f"| RePaint better in | | {shares} |", ""]
    kinds = np.array([case.kind for case in cases])
    lines += ["| feature distance by hole | " + " | ".join(HOLES) + " |"]
    lines += ["|---" * (len(HOLES) + 1) + "|"]
    for name, rows in scores.items():
        means = [f"{rows[kinds == kind, 0].mean():.4f}" for kind in HOLES if kind in kinds]
        lines.append(f"| {name} | {' | '.join(means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)

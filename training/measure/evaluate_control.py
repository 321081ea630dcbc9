"""Measure how closely a ControlNet of edges holds a model to the edges that it is shown.

    python training/measure/evaluate_control.py --control runs/emoji128-edges/controlnet

Of pictures that it has not learned from, the edges are shown to it with their captions; the same is
drawn without it. With `--prompt "an emoji"` edges alone tell what is where; with `--composed` the
pictures are composed of those held out, in other colours, counts and places, and told so. `f1` is
the mean agreement of the edges of what is drawn with those that were shown: the harmonic mean of
precision and recall, within 0.0075 of the diagonal, which at 64 pixels is the very pixel
(`latentdiff.metrics.edges`); and once more within a pixel, as any edges may be. `decoded` is that
of the pictures themselves, through the autoencoder: no control does better.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from latentdiff.data.composition import Composer, blaming_folder, read_rows, read_things
from latentdiff.data.folder import held_out
from latentdiff.data.variants import Variant
from latentdiff.editing.control_pictures import control_picture, edges
from latentdiff.errors import UserError
from latentdiff.files import make_folder, write_json
from latentdiff.formats.controlnet import load_controlnet
from latentdiff.metrics.edges import edge_agreement
from latentdiff.models.control import ControlNetwork
from latentdiff.pictures import grid, save_png, to_pil, to_tensor
from latentdiff.pipeline import Control, LatentDiffusionPipeline

_AT_ONCE = 16


def main(
    control: Annotated[Path, typer.Option(metavar="FOLDER", help="The ControlNet.")],
    model: Annotated[str | None, typer.Option(help="Default: the bundled model.")] = None,
    data: Annotated[Path, typer.Option(metavar="DIR", help="Pictures.")] = Path("data/emoji128"),
    style: Annotated[str, typer.Option(help="A value of the field `style`.")] = "noto",
    kind: Annotated[str, typer.Option(help="What it is shown.")] = "canny",
    count: Annotated[int, typer.Option(help="Pictures, evenly from those held out.")] = 96,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 4.0,
    scale: Annotated[float, typer.Option(help="Strength of the control.")] = 1.0,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="For all, in place of their captions.")
    ] = None,
    composed: Annotated[
        bool, typer.Option("--composed", help="Pictures composed of those held out.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where grid and numbers go.")] = Path(
        "runs/control-evaluation"
    ),
) -> None:
    """Measure the edges of what is drawn with and without a ControlNet."""
    try:
        pipe = LatentDiffusionPipeline.from_pretrained(model)
        network = load_controlnet(
            control, device=pipe.bundle.device, dtype=pipe.bundle.network.dtype
        )
        size = pipe.bundle.size
        if composed:
            pictures, captions = compose(data, style, count, min(size))
            pictures = [Variant().fill(picture, size) for picture in pictures]
        else:
            examples = held_out(data, count, where={"style": (style,), "skin_tone": ("",)})
            pictures = [Variant().fill(example.open(), size) for example in examples]
            captions = [example.captions[0] for example in examples]
        call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "seed": seed}
        told = {"scale": scale, "kind": kind}
        prompts = [prompt or caption for caption in captions]
        report = evaluate(pipe, network, prompts, pictures, told, call, out)
        for name, value in report["f1"].items():
            typer.echo(f"{name}: edges agree by {value}")
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def compose(data: Path, style: str, count: int, side: int) -> tuple[list[Image.Image], list[str]]:
    """`count` pictures composed of those of a style that are held out, and their captions.

    Raises:
        UserError: the folder is none of emoji, or holds no such picture out.
    """
    with blaming_folder(data):
        rows = [row for row in read_rows(data, None) if str(row["split"]).startswith("test")]
        rows = [row for row in rows if row["style"] == style and not row["skin_tone"]]
        if not rows:
            raise UserError(f"{data}: no picture of the style {style} is held out.")
        composer = Composer(rows, *read_things(data, rows, None, side), seed=0)
    samples = [composer.sample(number) for number in range(count)]
    return [Image.fromarray(one[0]) for one in samples], [one[1] for one in samples]


def evaluate(
    pipe: LatentDiffusionPipeline,
    network: ControlNetwork,
    prompts: Sequence[str],
    pictures: list[Image.Image],
    told: dict[str, Any],
    call: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """`control.json`, and `control.png`: what was shown, without, with, and the picture."""
    drawn: dict[str, list[Image.Image]] = {"decoded": [], "without": [], "with": []}
    for first in range(0, len(prompts), _AT_ONCE):
        part = list(prompts[first : first + _AT_ONCE])
        own = pictures[first : first + _AT_ONCE]
        height, width = pipe.bundle.size
        more: dict[str, Any] = call | {"first": first, "height": height, "width": width}
        drawn["without"] += pipe(part, **more).images
        drawn["with"] += pipe(part, controls=[Control(network, own, **told)], **more).images
        with torch.no_grad():
            latents = pipe.bundle.autoencoder.encode(torch.stack([to_tensor(one) for one in own]))
            drawn["decoded"] += [to_pil(one) for one in pipe.bundle.autoencoder.decode(latents)]
    wanted = [edges(one) for one in pictures]
    means: dict[str, float] = {}
    for name, images in drawn.items():
        found = [edges(one) for one in images]
        for label, tolerance in ((name, None), (f"{name}, within a pixel", 1)):
            pairs = zip(found, wanted, strict=True)
            scores = [edge_agreement(one, own, tolerance) for one, own in pairs]
            means[label] = round(sum(scores) / len(scores), 4)
    report = {"pictures": len(prompts), **call, **told, "f1": means}
    make_folder(out)
    write_json(out / "control.json", report, replace=True)
    rows: list[Image.Image] = []
    for number in range(0, len(pictures), max(1, len(pictures) // 12)):
        rows += [control_picture(pictures[number], told["kind"]), drawn["without"][number]]
        rows += [drawn["with"][number], pictures[number]]
    save_png(grid(rows, 12), out / "control.png", replace=True)
    return report


if __name__ == "__main__":
    typer.run(main)

"""Measure whether a fine-tune taught a model a new style: before and after, on the same seeds.

    python training/evaluate_style.py --style twemoji --pictures data/twemoji40 \\
        --lora runs/twemoji40-lora/pytorch_lora_weights.safetensors

A drawn picture has the style of its nearest real one (root mean square of 32x32 blurred RGB) among
all styles of DATA. `seen` are the emoji of the fine-tune's own pictures; `new` are as many others,
which the model knew in its old style only. `shows_asked` is the share whose nearest real picture,
of any style, is of the asked emoji. What the model keeps of other prompts is told by:

    python training/evaluate.py --splits train --no-card --lora FILE
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from PIL import Image
from torch import Tensor

from latentdiff.data.examples import Example, load_pictures
from latentdiff.data.folder import check_fields, read_folder
from latentdiff.errors import UserError
from latentdiff.learning.batches import to_range
from latentdiff.learning.order import generator
from latentdiff.metrics.nearest import blurred_thumbnails, nearest
from latentdiff.pictures import grid, save_png, to_pil
from latentdiff.pipeline import LatentDiffusionPipeline

FIELDS = ("style", "split", "codepoints", "skin_tone")
Shown = TypeVar("Shown")


def main(
    style: Annotated[str, typer.Option(help="The new style, a value of the field `style`.")],
    pictures: Annotated[Path, typer.Option(metavar="DIR", help="What was learned from.")],
    lora: Annotated[Path | None, typer.Option(help="The LoRA file of the fine-tune.")] = None,
    lora_scale: Annotated[float, typer.Option(help="Strength of the LoRA.")] = 1.0,
    tuned: Annotated[Path | None, typer.Option(help="Or its model folder.")] = None,
    model: Annotated[Path, typer.Option(help="The model before.")] = Path("assets/emoji64"),
    data: Annotated[Path, typer.Option(metavar="DIR", help="Real pictures, all styles.")] = Path(
        "data/emoji128"
    ),
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where grid and numbers go.")] = Path(
        "runs/style-evaluation"
    ),
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Of the choice of new emoji, and the noise.")] = 0,
) -> None:
    """Measure the style of a model's pictures before and after a fine-tune."""
    try:
        if (lora is None) == (tuned is None):
            raise UserError("name what the fine-tune made: --lora FILE or --tuned FOLDER")
        before = LatentDiffusionPipeline.from_pretrained(model)
        after = LatentDiffusionPipeline.from_pretrained(tuned or model)
        if lora is not None:
            after.load_lora(lora, lora_scale)
        settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "seed": seed}
        evaluate(before, after, Real(data, after.bundle.size[0]), style, pictures, out, settings)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


class Real:
    """Every real picture of every style."""

    def __init__(self, root: Path, size: int) -> None:
        self.examples = read_folder(root)
        check_fields(self.examples, FIELDS, root)
        self.pictures = load_pictures(self.examples, size)
        self.thumbnails = blurred_thumbnails(self.pictures)

    def measure(self, drawn: Tensor, wanted: Sequence[Example], style: str) -> dict[str, float]:
        """Shares of the drawn pictures with the style, and with the emoji, that was asked for."""
        _, at = nearest(blurred_thumbnails(drawn), self.thumbnails)
        found = [self.examples[int(number)].fields for number in at]
        styles = [fields["style"] == style for fields in found]
        shown = [
            f["codepoints"] == e.fields["codepoints"] for f, e in zip(found, wanted, strict=True)
        ]
        share = lambda hits: round(sum(hits) / len(hits), 4)  # noqa: E731
        return {"style": share(styles), "shows_asked": share(shown)}


def new_examples(
    real: Real, seen: Sequence[Example], style: str, known: str, seed: int
) -> list[Example]:
    """As many other pictures of the style, at random, whose emoji the model learned in `known`."""
    plain = [e for e in real.examples if e.fields["split"] == "train" and not e.fields["skin_tone"]]
    names = {e.fields["codepoints"] for e in plain if e.fields["style"] == known}
    names -= {example.fields["codepoints"] for example in seen}
    others = [e for e in plain if e.fields["style"] == style and e.fields["codepoints"] in names]
    order = generator(seed, 12).permutation(len(others))
    return [others[int(number)] for number in order[: len(seen)]]


def prompt(example: Example, style: str) -> str:
    """What it shows, in the new style."""
    plain = [caption for caption in example.captions if style not in caption]
    return f"{(plain or example.captions)[:2][-1]}, {style} style"


def spread(many: Sequence[Shown]) -> list[Shown]:
    """Twelve of them, or all, evenly from first to last."""
    shown = min(12, len(many))
    return [many[number * len(many) // shown] for number in range(shown)]


def draw(pipe: LatentDiffusionPipeline, prompts: list[str], settings: dict[str, float]) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1]; picture i has stream i of the seed."""
    parts: list[Tensor] = []
    for first in range(0, len(prompts), 20):
        made = pipe(
            prompts[first : first + 20],
            num_inference_steps=int(settings["num_inference_steps"]),
            guidance_scale=settings["guidance_scale"],
            seed=int(settings["seed"]),
            first=first,
            output_type="pt",
        )
        parts.append(made.images.cpu().float() * 2 - 1)
    return torch.cat(parts)


def evaluate(
    before: LatentDiffusionPipeline,
    after: LatentDiffusionPipeline,
    real: Real,
    style: str,
    pictures: Path,
    out: Path,
    settings: dict[str, float],
) -> None:
    """`style.json`, and `style.png`: rows of before, after and real pictures."""
    learned = read_folder(pictures)
    check_fields(learned, ("codepoints",), pictures)
    codepoints = {example.fields["codepoints"] for example in learned}
    seen = [
        example
        for example in real.examples
        if example.fields["style"] == style and example.fields["codepoints"] in codepoints
    ]
    if not seen:
        styles = ", ".join(sorted({str(e.fields["style"]) for e in real.examples}))
        raise UserError(f"no picture of the style {style!r} shows what {pictures} does: {styles}")
    new = new_examples(real, seen, style, "noto", int(settings["seed"]))
    report: dict[str, object] = {"style": style, **settings}
    rows: list[Image.Image] = []
    out.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("seen", seen), ("new", new)):
        if not wanted:  # the folder has no others
            continue
        prompts = [prompt(example, style) for example in wanted]
        drawn = {"before": draw(before, prompts, settings), "after": draw(after, prompts, settings)}
        for when, tensor in drawn.items():
            report[f"{name}, {when}"] = real.measure(tensor, wanted, style)
            typer.echo(f"{name}, {when}: {report[f'{name}, {when}']} of {len(wanted)}")
            rows += [to_pil(picture) for picture in spread(list(tensor))]
        own = [real.examples.index(example) for example in spread(wanted)]
        rows += [to_pil(picture) for picture in to_range(real.pictures[own])]
    (out / "style.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "style.png").unlink(missing_ok=True)
    save_png(grid(rows, min(12, len(seen))), out / "style.png")


if __name__ == "__main__":
    typer.run(main)

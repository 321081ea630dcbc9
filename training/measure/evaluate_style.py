"""Measure whether a fine-tune taught a model a new style: before and after, on the same seeds.

    python training/measure/evaluate_style.py --style streamline --pictures data/streamline40 \\
        --data data/emoji128 --data data/streamline \\
        --lora runs/streamline40-lora/pytorch_lora_weights.safetensors

`seen` are the emoji of the fine-tune's own pictures, asked in the new style; `new` are others,
asked in the new style, which the model knows in other styles only; `untouched` are captions of the
styles that it knew before, of emoji that are neither among those pictures nor named by a prior
prompt.

A drawn picture is what its nearest real one is (root mean square of 32x32 blurred RGB, of all
pictures of DATA in every style). `style` is the share whose nearest picture has the style that was
asked for, `shows_asked` that whose nearest picture is of the asked emoji, `both` that of which both
are true. `of_asked` is the same where only pictures of the asked emoji, in every style, are looked
at: a milder judge of what is shown, as strict a one of the style. `kept` is what is left of the
untouched captions' `shows_asked`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from PIL import Image
from torch import Tensor

from latentdiff.data.examples import Example, load_pictures
from latentdiff.data.folder import check_fields, read_folder
from latentdiff.errors import UserError
from latentdiff.files import make_folder, write_json
from latentdiff.learning.batches import to_range
from latentdiff.learning.presets import preset_of, prior_of
from latentdiff.metrics.nearest import blurred_thumbnails, nearest
from latentdiff.pictures import grid, save_png, to_pil
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.random_numbers import philox

FIELDS = ("style", "split", "codepoints", "skin_tone")
Shown = TypeVar("Shown")


def main(
    style: Annotated[str, typer.Option(help="The new style, a value of the field `style`.")],
    pictures: Annotated[Path, typer.Option(metavar="DIR", help="The pictures of the fine-tune.")],
    lora: Annotated[Path | None, typer.Option(help="The LoRA file of the fine-tune.")] = None,
    lora_scale: Annotated[float, typer.Option(help="Strength of the LoRA.")] = 1.0,
    embedding: Annotated[Path | None, typer.Option(help="A new word learned with it.")] = None,
    tuned: Annotated[Path | None, typer.Option(help="Or its model folder.")] = None,
    model: Annotated[Path, typer.Option(help="The model before.")] = Path("assets/emoji128"),
    prior: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The fine-tune's prior prompts, a line each. Default: those that a fine-tune of "
            "the model before draws by itself, of the captions in its folder.",
        ),
    ] = None,
    new: Annotated[int, typer.Option(help="How many things not learned in the style.")] = 120,
    untouched: Annotated[int, typer.Option(help="How many captions of the old styles.")] = 200,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Real pictures of all styles; may be given again, for a style of another set. "
            "Default: data/emoji128.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where grid and numbers go.")] = Path(
        "runs/style-evaluation"
    ),
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise and the choice of new emoji.")] = 0,
) -> None:
    """Measure the style of a model's pictures before and after a fine-tune."""
    try:
        if (lora is None) == (tuned is None):
            raise UserError("name what the fine-tune made: --lora FILE or --tuned FOLDER")
        before = LatentDiffusionPipeline.from_pretrained(model)
        after = LatentDiffusionPipeline.from_pretrained(tuned or model)
        if lora is not None:
            after.load_lora(lora, lora_scale)
        if embedding is not None:
            after.load_textual_inversion(embedding)
        settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "seed": seed}
        real = Real(data or [Path("data/emoji128")], after.bundle.size[0])
        count = int(str(prior_of(preset_of(str(model)))["count"]))
        told = set(before.bundle.captions[:count]) if prior is None else read_lines(prior)
        groups = choose(real, style, pictures, told, new, untouched, seed)
        evaluate(before, after, real, style, groups, out, settings)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


class Real:
    """Every real picture of every style."""

    def __init__(self, roots: Sequence[Path], size: int) -> None:
        self.examples: list[Example] = []
        for root in roots:
            found = read_folder(root)
            check_fields(found, FIELDS, root)
            self.examples += found
        self.pictures = load_pictures(self.examples, size)
        self.thumbnails = blurred_thumbnails(self.pictures)

    def measure(self, drawn: Tensor, wanted: Sequence[Example]) -> dict[str, object]:
        """Shares of the drawn pictures with the style, and with the emoji, that was asked for."""
        asked = {example.fields["codepoints"] for example in wanted}
        every = range(len(self.examples))
        of_asked = [n for n in every if self.examples[n].fields["codepoints"] in asked]
        thumbnails = blurred_thumbnails(drawn)
        milder = self.shares(thumbnails, wanted, of_asked)
        return {**self.shares(thumbnails, wanted, every), "of_asked": milder}

    def shares(
        self, thumbnails: Tensor, wanted: Sequence[Example], places: Sequence[int]
    ) -> dict[str, float]:
        """The same, where only the real pictures at some places are looked at."""
        _, at = nearest(thumbnails, self.thumbnails[list(places)])
        found = [self.examples[places[int(number)]].fields for number in at]
        pairs = list(zip(found, (example.fields for example in wanted), strict=True))
        styles = [one["style"] == other["style"] for one, other in pairs]
        shown = [one["codepoints"] == other["codepoints"] for one, other in pairs]
        both = [style and asked for style, asked in zip(styles, shown, strict=True)]
        hits = {"style": styles, "shows_asked": shown, "both": both}
        return {name: round(sum(each) / len(each), 4) for name, each in hits.items()}


def read_lines(path: Path) -> set[str]:
    """Lines of a file of prompts.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return {line.strip() for line in path.read_text("utf-8").splitlines()}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prior prompts of {path}: {error}") from error


def choose(
    real: Real,
    style: str,
    pictures: Path,
    prior: set[str],
    new: int,
    untouched: int,
    seed: int,
) -> dict[str, tuple[list[Example], list[str]]]:
    """Pictures, and what is asked for them: seen ones, and `new` and `untouched` ones at random.

    Raises:
        UserError: none of the style's pictures shows what the fine-tune's do.
    """
    learned = read_folder(pictures)
    check_fields(learned, ("codepoints",), pictures)
    taught = {example.fields["codepoints"] for example in learned}
    own = [example for example in real.examples if example.fields["style"] == style]
    seen = [example for example in own if example.fields["codepoints"] in taught]
    if not seen:
        styles = ", ".join(sorted({str(e.fields["style"]) for e in real.examples}))
        raise UserError(f"no picture of the style {style!r} shows what {pictures} does: {styles}")
    plain = [e for e in real.examples if e.fields["split"] == "train" and not e.fields["skin_tone"]]
    old = [e for e in plain if e.fields["style"] != style and e.fields["codepoints"] not in taught]
    names = {example.fields["codepoints"] for example in old}
    unseen = [e for e in plain if e.fields["style"] == style and e.fields["codepoints"] in names]
    held = {e.fields["codepoints"] for e in real.examples if prior.intersection(e.captions)}
    others = [e for e in old if e.fields["codepoints"] not in held]
    unseen, others = shuffled(unseen, seed, 12)[:new], shuffled(others, seed, 14)[:untouched]
    return {
        "seen": (seen, [prompt(example, style) for example in seen]),
        "new": (unseen, [prompt(example, style) for example in unseen]),
        "untouched": (others, [example.captions[0] for example in others]),
    }


def shuffled(examples: Sequence[Example], seed: int, purpose: int) -> list[Example]:
    return [examples[int(n)] for n in philox(seed, purpose).permutation(len(examples))]


def prompt(example: Example, style: str) -> str:
    """Make the prompt of an example in the new style, from one of its captions."""
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
    groups: dict[str, tuple[list[Example], list[str]]],
    out: Path,
    settings: dict[str, float],
) -> None:
    """`style.json`, and `style.png`: rows of before, after and real pictures."""
    report: dict[str, object] = {"style": style, **settings}
    rows: list[Image.Image] = []
    make_folder(out)
    for name, (wanted, prompts) in groups.items():
        if not wanted:  # the folder has no others
            continue
        drawn = {"before": draw(before, prompts, settings), "after": draw(after, prompts, settings)}
        for when, tensor in drawn.items():
            report[f"{name}, {when}"] = real.measure(tensor, wanted)
            typer.echo(f"{name}, {when}: {report[f'{name}, {when}']} of {len(wanted)}")
        if name == "untouched":
            continue
        for tensor in drawn.values():
            rows += [to_pil(picture) for picture in spread(list(tensor))]
        own = [real.examples.index(example) for example in spread(wanted)]
        rows += [to_pil(picture) for picture in to_range(real.pictures[own])]
    report["kept"] = kept(report)
    if report["kept"] is not None:
        typer.echo(f"untouched captions kept: {100 * float(str(report['kept'])):.1f} %")
    write_json(out / "style.json", report, replace=True)
    save_png(grid(rows, min(12, len(groups["seen"][0]))), out / "style.png", replace=True)


def kept(report: Mapping[str, object]) -> float | None:
    """The untouched captions' `shows_asked` after, as a share of that before; None without any."""
    before, after = (report.get(f"untouched, {when}") for when in ("before", "after"))
    if not (isinstance(before, dict) and isinstance(after, dict) and before["shows_asked"]):
        return None
    return round(after["shows_asked"] / before["shows_asked"], 4)


if __name__ == "__main__":
    typer.run(main)

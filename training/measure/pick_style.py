"""A small folder of one style, to fine-tune on, out of a large captioned one.

    python training/measure/pick_style.py --data data/emoji128 --style twemoji --out data/twemoji40

Copies pictures of emoji that the bundled model knows in another style, captioned "a red heart,
twemoji style" and the like, and writes `prior.txt`: captions of the style that the model knows,
which `latentdiff finetune --prior-prompt @prior.txt` keeps it from unlearning. The bundled model's
own `captions.txt`, its prior where none is named, is the one that the defaults here write.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.data.examples import Example
from latentdiff.data.folder import check_fields, read_folder
from latentdiff.errors import UserError
from latentdiff.files import make_folder, writing_folder
from latentdiff.random_numbers import philox

KEPT = ("codepoints", "license", "source")  # of a picture's fields


def main(
    style: Annotated[str, typer.Option(help="The new style, a value of the field `style`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Pictures with `style`, `split`, `codepoints`.")
    ] = Path("data/emoji128"),
    known: Annotated[str, typer.Option(help="The style that the model knows.")] = "noto",
    count: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 40,
    prior: Annotated[int, typer.Option(min=0, help="How many captions in prior.txt.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice.")] = 0,
) -> None:
    """Copy some pictures of one style, with captions."""
    try:
        pick(style, out, data, known, count, prior, seed)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def plain_pictures(data: Path, style: str) -> list[Example]:
    """A style's training pictures without skin tones and near copies of other emoji."""
    found = read_folder(data, where={"style": (style,), "split": ("train",)})
    check_fields(found, ("codepoints",), data)
    return [e for e in found if not (e.fields.get("skin_tone") or e.fields.get("near_dup_of"))]


def chosen(data: Path, style: str, known: str, count: int, seed: int) -> list[Example]:
    """`count` pictures of `style`, at random, whose emoji the model learned in `known`."""
    names = {example.fields["codepoints"] for example in plain_pictures(data, known)}
    both = [e for e in plain_pictures(data, style) if e.fields["codepoints"] in names]
    if len(both) < count:
        raise UserError(f"{data} has only {len(both)} pictures of {style} to choose from")
    order = philox(seed, 11).permutation(len(both))
    return [both[int(number)] for number in order[:count]]


def pick(style: str, out: Path, data: Path, known: str, count: int, prior: int, seed: int) -> None:
    """Pictures, metadata.jsonl and prior.txt into `out`."""
    examples = chosen(data, style, known, count, seed)
    make_folder(out.parent)
    with writing_folder(out, replace=False) as stage:
        rows: list[dict[str, object]] = []
        for example in examples:
            name = Path(str(example.fields["file_name"])).name
            (stage / name).write_bytes(example.read())
            plain = [caption for caption in example.captions if style not in caption]
            styled = [f"{caption}, {style} style" for caption in plain or example.captions]
            rows.append(
                {"file_name": name, "captions": styled}
                | {key: example.fields[key] for key in KEPT if key in example.fields}
            )
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (stage / "metadata.jsonl").write_text(lines, "utf-8")
        (stage / "prior.txt").write_text(
            "".join(f"{line}\n" for line in priors(data, known, prior, seed))
        )
    typer.echo(f"{len(examples)} pictures and prior.txt in {out}")


def priors(data: Path, known: str, count: int, seed: int) -> list[str]:
    """Captions of the known style: by turns one that names it and one that does not."""
    examples = plain_pictures(data, known)
    lines: list[str] = []
    for place, number in enumerate(philox(seed, 13).permutation(len(examples))[:count]):
        captions = examples[int(number)].captions
        plain = [caption for caption in captions if known not in caption]
        lines.append(captions[0] if place % 2 == 0 else (plain or captions)[:2][-1])
    return lines


if __name__ == "__main__":
    typer.run(main)

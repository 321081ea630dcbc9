"""A small folder of one style, to fine-tune on, out of a large captioned one.

    python training/measure/pick_style.py --data data/streamline --style streamline \\
        --known-data data/emoji128 --out data/streamline40

Copies pictures of emoji that the bundled model knows in another style, captioned "a red heart,
streamline style" and the like.
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
    known_data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Its pictures. Default: --data.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice.")] = 0,
) -> None:
    """Copy some pictures of one style, with captions."""
    try:
        pick(style, out, (data, known_data or data), known, count, seed)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def plain_pictures(data: Path, style: str) -> list[Example]:
    """A style's training pictures without skin tones and near copies of other emoji."""
    found = read_folder(data, where={"style": (style,), "split": ("train",)})
    check_fields(found, ("codepoints",), data)
    return [e for e in found if not (e.fields.get("skin_tone") or e.fields.get("near_dup_of"))]


def chosen(data: tuple[Path, Path], style: str, known: str, count: int, seed: int) -> list[Example]:
    """`count` pictures of `style`, at random, whose emoji the model learned in `known`."""
    names = {example.fields["codepoints"] for example in plain_pictures(data[1], known)}
    both = [e for e in plain_pictures(data[0], style) if e.fields["codepoints"] in names]
    if len(both) < count:
        raise UserError(f"{data[0]} has only {len(both)} pictures of {style} to choose from")
    order = philox(seed, 11).permutation(len(both))
    return [both[int(number)] for number in order[:count]]


def pick(
    style: str,
    out: Path,
    data: tuple[Path, Path],
    known: str,
    count: int,
    seed: int,
) -> None:
    """Pictures and metadata.jsonl into `out`; `data` has the new and the known style."""
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
    typer.echo(f"{len(examples)} pictures in {out}")


if __name__ == "__main__":
    typer.run(main)

"""A style that the bundled model does not know: a public icon set as pictures with captions.

    pip install resvg-py  # a wheel, which draws SVG
    npm pack @iconify-json/streamline-emojis@1.2.4
    tar xzf iconify-json-streamline-emojis-1.2.4.tgz
    python training/measure/icon_style.py --icons package --style streamline --out data/streamline

Takes a package of iconify's (`icons.json`, `info.json` with the licence) and draws, on white, every
icon whose name is that of an emoji in DATA ("boar" or the first of several, "boar-1"). Captions are
those of the emoji without a style, and its code points are kept: so `pick_style.py` finds the same
thing in both sets, and `evaluate_style.py` knows what a drawn picture should look like.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.data.examples import Example
from latentdiff.data.folder import check_fields, read_folder
from latentdiff.errors import UserError
from latentdiff.files import make_folder, writing_folder
from latentdiff.learning.command import told_in_one_line

SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
SVG += 'viewBox="{left} {top} {width} {height}">{body}</svg>'


def main(
    icons: Annotated[Path, typer.Option(metavar="DIR", help="A package of iconify's.")],
    style: Annotated[str, typer.Option(help="The style's name, for the field `style`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Emoji, with `style`, `name`, `codepoints`.")
    ] = Path("data/emoji128"),
    known: Annotated[str, typer.Option(help="A style of DATA's, for names and captions.")] = "noto",
    size: Annotated[int, typer.Option(min=8, help="Side of the pictures.")] = 128,
) -> None:
    """Draw the icons that show what an emoji shows."""
    with told_in_one_line():
        found, licence, source = read_icons(icons)
        pairs = matched(found, emoji_by_name(data, known))
        if not pairs:
            raise UserError(f"no icon of {icons} has the name of an emoji of {data}")
        write(out, style, size, pairs, {"license": licence, "source": source})
        typer.echo(f"{len(pairs)} of {len(found)} icons in {out}; {source}: {licence}")


def emoji_by_name(data: Path, known: str) -> dict[str, Example]:
    """A style's training pictures without skin tones, each by the letters of its emoji's name."""
    found = read_folder(data, where={"style": (known,), "split": ("train",)})
    check_fields(found, ("name", "codepoints"), data)
    return {squashed(str(e.fields["name"])): e for e in found if not e.fields.get("skin_tone")}


def squashed(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.casefold())


def read_icons(package: Path) -> tuple[dict[str, str], str, str]:
    """The SVG of each icon by its name, and the set's licence and source.

    Raises:
        UserError: a file of the package is missing or not of iconify's format.
    """
    try:
        icons = json.loads((package / "icons.json").read_text("utf-8"))
        info = json.loads((package / "info.json").read_text("utf-8"))
        place = {"left": 0, "top": 0} | {key: icons[key] for key in ("width", "height")}
        drawn = {name: SVG.format_map(place | icon) for name, icon in icons["icons"].items()}
        author = info["author"]
        return drawn, info["license"]["spdx"], f"{info['name']}, {author['name']}, {author['url']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{package} is no package of iconify's: {error!r}") from None


def matched(icons: Mapping[str, str], emoji: Mapping[str, Example]) -> list[tuple[str, Example]]:
    """The SVG and the emoji of each icon that has an emoji's name; of several icons the first."""
    backwards = sorted(icons, reverse=True)  # so that the first, "boar" before "boar-1", stays
    pairs = ((emoji.get(squashed(re.sub("-1$", "", name))), icons[name]) for name in backwards)
    found = {example.fields["codepoints"]: (svg, example) for example, svg in pairs if example}
    return list(found.values())


def write(
    out: Path, style: str, size: int, icons: Iterable[tuple[str, Example]], fields: dict[str, str]
) -> None:
    """Pictures and metadata.jsonl into `out`.

    Raises:
        UserError: resvg-py is not installed, or the folder is there already.
    """
    try:
        import resvg_py  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("icons are drawn by resvg-py: pip install resvg-py") from None
    make_folder(out.parent)
    with writing_folder(out, replace=False) as stage:
        rows: list[dict[str, object]] = []
        for svg, example in icons:
            code = str(example.fields["codepoints"])
            picture = resvg_py.svg_to_bytes(
                svg_string=svg, width=size, height=size, background="white"
            )
            (stage / f"{code}.png").write_bytes(picture)
            known = str(example.fields["style"])
            plain = [caption for caption in example.captions if known not in caption]
            captions = plain or list(example.captions)
            row = {"style": style, "split": "train", "codepoints": code, "skin_tone": ""}
            rows.append({"file_name": f"{code}.png", "captions": captions, **row, **fields})
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (stage / "metadata.jsonl").write_text(lines, "utf-8")


if __name__ == "__main__":
    typer.run(main)

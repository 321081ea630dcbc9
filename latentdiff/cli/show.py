"""`latentdiff show`: how a picture was drawn."""

import json
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.errors import shown


def show(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="PNG, JPEG or WebP.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead.")] = False,
) -> None:
    """Print how PICTURE was drawn, as latentdiff, A1111, ComfyUI or InvokeAI wrote into it.

    `latentdiff generate --from PICTURE` draws it again.
    """
    from latentdiff.formats.picture_text import read_recipe

    recipe = read_recipe(picture)
    if as_json:
        print(json.dumps({"program": recipe.program, **recipe.settings}, ensure_ascii=False))
        return
    rows = {"program": recipe.program} | recipe.settings
    if recipe.left:
        rows["not used here"] = ", ".join(recipe.left)
    width = max(map(len, rows))
    for name, value in rows.items():
        if value not in (None, [], ""):
            print(f"{shown(name, 80):{width}}  {shown(value)}")

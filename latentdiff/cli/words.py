"""`latentdiff words`: what a model knows near a word."""

from typing import Annotated

import typer

from latentdiff.cli.options import Model
from latentdiff.errors import UserError


def words(
    text: Annotated[str, typer.Argument(metavar="WORD", help="A word, or a few.")],
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="Captions, at most.")] = 10,
    model: Model = None,
) -> None:
    """List what a model knows near WORD, the nearest first, by the captions in its folder.

    Captions with the word itself come first, then those that its text encoder puts near it. Each is
    a prompt: `latentdiff generate` draws it.
    """
    from latentdiff.formats.location import find
    from latentdiff.formats.model_captions import FILE, read_captions
    from latentdiff.pipeline.prompts import check_prompts

    if not text.strip():
        raise UserError("WORD: it is empty; say what to look for, as flower.")
    check_prompts(text, "WORD")
    folder = find(model)
    if not folder.is_dir() or not read_captions(folder):
        raise UserError(f"{model or folder.name} has no {FILE}, so nothing tells what it knows.")
    from latentdiff.bundle import Bundle
    from latentdiff.pipeline.vocabulary import near

    for caption in near(Bundle.load(model, device="cpu"), text, number):
        print(caption)

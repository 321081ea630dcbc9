"""`latentdiff data`: folders of captioned pictures."""

from pathlib import Path
from typing import Annotated

import typer


def emoji(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="A new folder.")],
    size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 128,
    font: Annotated[
        Path | None, typer.Option(help="Noto Color Emoji. Default: the installed one.")
    ] = None,
    emoji_test: Annotated[
        Path | None, typer.Option(help="Unicode's emoji-test.txt. Default: the installed one.")
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="CLDR's common folder. Default: the installed one."),
    ] = None,
) -> None:
    """Draw the Noto emoji, with captions, out of installed system files.

    They come with: apt install fonts-noto-color-emoji unicode-data unicode-cldr-core libfribidi0
    """
    from latentdiff.data import emoji as noto

    count = noto.build_emoji_folder(
        out,
        size,
        font=font or noto.FONT,
        emoji_test=emoji_test or noto.EMOJI_TEST,
        annotations=annotations or noto.ANNOTATIONS,
    )
    print(f"{count} pictures in {out}")


def compose(
    root: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Single things on white, as `data emoji` draws them."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    count: Annotated[int, typer.Option(min=1, help="Composed pictures.")] = 10_000,
    size: Annotated[int, typer.Option(min=16, help="Height and width in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="What is composed.")] = 0,
    wordnet: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="WordNet's data.noun and index.noun, for broader words."),
    ] = None,
    skin_tones: Annotated[
        bool, typer.Option("--skin-tones", help="With the plain ones that have a skin tone, too.")
    ] = False,
) -> None:
    """Put new pictures made of a folder's beside its plain ones: colours, counts, pairs, places.

    WordNet comes with: apt install wordnet-base (in /usr/share/wordnet).
    """
    from latentdiff.data.composed_folder import compose_folder

    made = compose_folder(
        root, out, count, size=size, seed=seed, wordnet=wordnet, skin_tones=skin_tones
    )
    print(f"{made} pictures in {out}; seed {seed}")


def shard(
    root: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Captioned pictures: a folder, parquet or tar files."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    size: Annotated[int, typer.Option(min=1, help="Pictures in a shard.")] = 1000,
) -> None:
    """Put a picture folder into WebDataset shards OUT/00000.tar, ...; train with
    data.root='OUT/{00000..00099}.tar'."""
    from latentdiff.data.packing import write_shards

    count = write_shards(root, out, size)
    last = f"{{00000..{count - 1:05}}}" if count > 1 else "00000"
    print(f"{count} shards: {out}/{last}.tar")

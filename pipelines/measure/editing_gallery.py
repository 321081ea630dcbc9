"""The pictures of docs/editing.md, drawn by the bundled model.

    python pipelines/measure/editing_gallery.py --out gallery

Default settings and first seeds unless said below. The photo is read from docs/pictures/photo.png.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from latentdiff import (
    ILVR,
    Blend,
    Differential,
    Hires,
    LatentDiffusionPipeline,
    RePaint,
    SDEdit,
    TiledDiffusion,
)
from latentdiff.diffusion.sampling import Edit
from latentdiff.editing import extended
from latentdiff.editing.masks import fill, mask_tensor
from latentdiff.errors import UserError
from latentdiff.files import make_folder, writing
from latentdiff.pictures import grid, open_picture, save_png, to_pil, to_tensor
from latentdiff.pipeline.interpolation import between_prompts
from latentdiff.pipeline.swapping import swapped

SIDE = 128
PHOTO = Path(__file__).parents[2] / "docs/pictures/photo.png"


def draw(
    pipe: LatentDiffusionPipeline, prompt: str, edit: Edit, count: int = 1, scale: float = 4.0
) -> list[Image.Image]:
    """The first pictures of seed 0."""
    output = pipe(
        prompt,
        edits=[edit],
        seed=0,
        num_images_per_prompt=count,
        guidance_scale=scale,
        progress=False,
    )
    return output.images


def strokes(paint: Callable[[ImageDraw.ImageDraw], object]) -> Image.Image:
    """A scribble drawn large and made small, so that its edges are smooth."""
    image = Image.new("RGB", (4 * SIDE, 4 * SIDE), "white")
    paint(ImageDraw.Draw(image))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def heart(pen: ImageDraw.ImageDraw) -> None:
    pen.ellipse((50, 70, 280, 320), fill=(210, 40, 50))
    pen.ellipse((232, 70, 462, 320), fill=(210, 40, 50))
    pen.polygon([(66, 260), (446, 260), (256, 475)], fill=(210, 40, 50))


def smile(pen: ImageDraw.ImageDraw) -> None:
    pen.ellipse((50, 50, 460, 460), fill=(250, 200, 60))
    pen.ellipse((150, 170, 200, 230), fill=(70, 50, 20))
    pen.ellipse((310, 170, 360, 230), fill=(70, 50, 20))
    pen.arc((140, 200, 370, 380), 20, 160, fill=(90, 50, 20), width=26)


def tree(pen: ImageDraw.ImageDraw) -> None:
    pen.rectangle((225, 330, 285, 480), fill=(130, 80, 40))
    pen.polygon([(256, 30), (90, 350), (420, 350)], fill=(40, 130, 60))


def snowman(pen: ImageDraw.ImageDraw) -> None:
    for box in ((110, 260, 400, 480), (160, 90, 350, 280)):
        pen.ellipse(box, fill=(245, 245, 250), outline=(160, 180, 200), width=12)
    pen.rectangle((180, 40, 330, 110), fill=(60, 60, 70))


def scribbles(pipe: LatentDiffusionPipeline) -> Image.Image:
    """Four scribbles, each before what became of it at strength 0.6."""
    wanted = {
        "a red heart": heart,
        "a grinning face": smile,
        "an evergreen tree": tree,
        "a snowman": snowman,
    }
    row: list[Image.Image] = []
    for prompt, paint in wanted.items():
        guide = strokes(paint)
        row += [guide, *draw(pipe, prompt, SDEdit(guide, 0.6), 3)]
    return grid(row, 8)


def strengths(pipe: LatentDiffusionPipeline) -> Image.Image:
    """One scribble at strengths 0, 0.2, 0.4, 0.6, 0.8 and 1."""
    guide = strokes(tree)
    return grid(
        [draw(pipe, "an evergreen tree", SDEdit(guide, fifth / 5))[0] for fifth in range(6)], 6
    )


def box(x0: int, y0: int, x1: int, y1: int) -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE), 0)
    ImageDraw.Draw(mask).rectangle((x0, y0, x1 - 1, y1 - 1), fill=255)
    return mask


def holes(pipe: LatentDiffusionPipeline) -> Image.Image:
    """The picture, the hole, Blend and RePaint, of pictures that the model drew."""
    cases = [
        ("a grinning face", box(8, 8, 120, 70), "smiling face with sunglasses"),
        ("a cat face", box(0, 0, 128, 62), "a cat face"),
        ("a red heart", box(64, 8, 122, 122), "a red heart"),
        ("a grinning face", box(8, 68, 120, 120), "angry face"),
    ]
    row: list[Image.Image] = []
    for prompt, mask, wanted in cases:
        picture = pipe(prompt, seed=0, progress=False).images[0]
        grey = Image.composite(Image.new("RGB", picture.size, "grey"), picture, mask)
        row += [picture, grey]
        row += [
            *draw(pipe, wanted, Blend(picture, mask)),
            *draw(pipe, wanted, RePaint(picture, mask)),
        ]
    return grid(row, 8)


def sunset() -> Image.Image:
    share = np.linspace(0, 1, SIDE)[:, None, None] * np.ones((1, SIDE, 1))
    pixels = np.array([250, 200, 90]) * (1 - share) + np.array([160, 40, 110]) * share
    return Image.fromarray(pixels.astype(np.uint8))


def colours(pipe: LatentDiffusionPipeline) -> Image.Image:
    """A reference; a heart and a cat held to it in latents, and in pixels."""
    disc = strokes(lambda pen: pen.ellipse((50, 50, 460, 460), fill=(50, 120, 220)))
    row: list[Image.Image] = []
    for reference in (sunset(), disc):
        row.append(reference)
        for edit in (ILVR(reference), ILVR(reference, space="pixels")):
            for prompt in ("a red heart", "a cat face"):
                row += draw(pipe, prompt, edit)
    return grid(row, 5)


def way(pipe: LatentDiffusionPipeline) -> Image.Image:
    """From one prompt to another, twice."""
    weights = [k / 7 for k in range(8)]
    drawn = [
        between_prompts(pipe, a, b, weights)
        for a, b in (("a red heart", "a grinning face"), ("a full moon", "a soccer ball"))
    ]
    return grid([to_pil(one * 2 - 1) for one in torch.cat(drawn)], 8)


@torch.no_grad()
def photo(pipe: LatentDiffusionPipeline) -> Image.Image:
    """A photo, as the autoencoder has it, with a hole, as the encoder sees that, and filled."""
    picture = open_picture(PHOTO)
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).ellipse((44, 36, 76, 60), fill=255)
    pixels = to_tensor(picture)[None]
    decoded = pipe.bundle.autoencoder.decode(pipe.bundle.autoencoder.encode(pixels)).float()
    grey = Image.composite(Image.new("RGB", picture.size, "grey"), picture, mask)
    filled = fill(pixels, mask_tensor(mask))
    repainted = draw(pipe, "a cat face", RePaint(picture, mask), count=4, scale=1.0)
    steps = [border_step(image, mask) for image in (picture, *repainted)]
    print("grey levels across the border, in the photo and four paintings:", *steps)
    return grid([picture, to_pil(decoded[0]), grey, to_pil(filled[0]), repainted[0]], 5)


def border_step(picture: Image.Image, mask: Image.Image) -> float:
    """Mean difference of neighbouring pixels of which one is in the hole, in grey levels of 255."""
    pixels, hole = np.asarray(picture).astype(float), np.asarray(mask) >= 128
    found: list[float] = []
    for axis in (0, 1):
        found += list(abs(np.diff(pixels, axis=axis)).mean(-1)[np.diff(hole, axis=axis)])
    return round(float(np.mean(found)), 1)


def larger(pipe: LatentDiffusionPipeline) -> Image.Image:
    """Two prompts at 256 pixels: the model's own size enlarged, plainly, in windows, two passes."""
    cells: list[Image.Image] = []
    for prompt in ("a red heart", "a cat face"):
        small = pipe(prompt, seed=0, progress=False).images[0]
        cells.append(small.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC))
        for size, edits in (
            (2 * SIDE, []),
            (2 * SIDE, [TiledDiffusion()]),
            (SIDE, [Hires(2, 0.3)]),
            (SIDE, [Hires(2, 0.5)]),
        ):
            drawn = pipe(prompt, seed=0, height=size, width=size, edits=edits, progress=False)
            cells += drawn.images
    return grid(cells, 5)


def beyond(pipe: LatentDiffusionPipeline) -> Image.Image:
    """Three drawings, cut in half, each before what is painted beyond its border."""
    cells: list[Image.Image] = []
    for prompt in ("a cat face", "a grinning face", "a red heart"):
        whole = pipe(prompt, seed=0, progress=False).images[0]
        half = whole.crop((0, 0, SIDE // 2, SIDE))
        wider, room = extended(half, right=SIDE // 2)
        shown = wider.copy()
        shown.paste((200, 200, 200), (SIDE // 2, 0, SIDE, SIDE))
        cells += [shown, *draw(pipe, prompt, RePaint(wider, room))]
    return grid(cells, 6)


def regions(pipe: LatentDiffusionPipeline) -> Image.Image:
    """A wide heart; a cat in its right half; the cat, and no heart there."""
    right = "box:128,0,256,128"
    cat, no_heart = ("a cat face", 1.0, right), ("a red heart", -1.0, right)
    cells: list[Image.Image] = []
    for also in ([], [cat], [cat, no_heart]):
        drawn = pipe("a red heart", also=also, height=SIDE, width=2 * SIDE, seed=0, progress=False)
        cells += drawn.images
    return grid(cells, 3)


def soft(pipe: LatentDiffusionPipeline) -> Image.Image:
    """The cat, a soft mask, and three prompts under it."""
    cat = INPUTS["cat"](pipe)
    ramp = Image.linear_gradient("L").rotate(90).resize((SIDE, SIDE))
    cells = [cat, ramp.convert("RGB")]
    for prompt in ("a tiger face", "a grinning face", "a green heart"):
        cells += draw(pipe, prompt, Differential(cat, ramp))
    return grid(cells, 5)


def swaps(pipe: LatentDiffusionPipeline) -> Image.Image:
    """A heart and a face, each before three swaps."""
    heart = pipe("a red heart", seed=0, progress=False).images[0]
    face = INPUTS["face"](pipe)
    cells = [heart]
    cells += [
        swapped(pipe, heart, "a red heart", f"a {colour} heart", strength=strength)
        for colour, strength in (("green", 0.5), ("green", 0.6), ("blue", 0.7))
    ]
    cells.append(face)
    cells += [
        swapped(pipe, face, "a grinning face", "a crying face", strength=strength)
        for strength in (0.6, 0.7, 0.8)
    ]
    return grid(cells, 8)


PICTURES = {
    "beyond": beyond,
    "swaps": swaps,
    "regions": regions,
    "soft": soft,
    "larger": larger,
    "scribbles": scribbles,
    "strengths": strengths,
    "holes": holes,
    "colours": colours,
    "way": way,
    "photo-parts": photo,
}
# What the docs' own commands are given: two of the model's drawings, a mask, two scribbles.
INPUTS: dict[str, Callable[[LatentDiffusionPipeline], Image.Image]] = {
    "tree": lambda _: strokes(tree),
    "sunset": lambda _: sunset(),
    "cat": lambda pipe: pipe("a cat face", seed=0, progress=False).images[0],
    "face": lambda pipe: pipe("a grinning face", seed=0, progress=False).images[0],
    "ramp": lambda _: Image.linear_gradient("L").rotate(90).resize((SIDE, SIDE)),
    "eyes": lambda _: box(16, 36, 112, 78),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/editing.md.")
    parser.add_argument("--out", type=Path, default=Path("gallery"), help="a folder")
    parser.add_argument("--only", choices=PICTURES, nargs="*", default=list(PICTURES))
    given = parser.parse_args()
    for name in (*given.only, *INPUTS):
        if (given.out / f"{name}.png").exists():
            parser.exit(2, f"error: {given.out / name}.png is there already: another folder.\n")
    try:
        make_folder(given.out)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    pipe = LatentDiffusionPipeline.from_pretrained(device="cpu", dtype="float32")
    for name, make in PICTURES.items():
        if name in given.only:
            path = given.out / f"{name}.png"
            small = make(pipe).quantize(256, dither=Image.Dither.NONE)  # a third of the bytes
            with writing(path, replace=False) as stage:
                small.save(stage, optimize=True)
            print(path)
    for name, make in INPUTS.items():
        print(save_png(make(pipe).convert("RGB"), given.out / f"{name}.png"))


if __name__ == "__main__":
    main()

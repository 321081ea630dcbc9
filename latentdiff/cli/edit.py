"""`latentdiff edit | inpaint | ilvr`: pictures out of words and another picture."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from latentdiff.cli.options import (
    Fit,
    Grid,
    Prompt,
    RunOptions,
    seed_or_fresh,
    with_run_options,
)
from latentdiff.cli.output import check_writable, draw_in_parts, place_of
from latentdiff.errors import UserError, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

    from latentdiff.diffusion.edits import Edit
    from latentdiff.pipeline import LatentDiffusionPipeline

Number = Annotated[int, typer.Option("-n", "--number", min=1, max=64, help="Number of pictures.")]


@with_run_options
def edit(
    picture: Annotated[
        Path, typer.Argument(metavar="PICTURE", help="PNG, JPEG, WebP, BMP or AVIF.")
    ],
    prompt: Prompt,
    *,
    strength: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Strength of the change: 0 keeps PICTURE, 1 ignores it. Default: 0.6; with an "
            "InstructPix2Pix model, which sees PICTURE anyway, 1.",
        ),
    ] = None,
    image_guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="How closely an InstructPix2Pix model keeps to PICTURE; 1 is off. Default: 1.5."
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, max=100, help="Number of times to noise and redraw.")
    ] = 1,
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="MASK", help="Change only this part: FILE (white), box:x0,y0,x1,y1, alpha."
        ),
    ] = None,
    soft_mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Change each place as much as it is light: black stays as it is."
        ),
    ] = None,
    number: Number = 1,
    grid: Grid = False,
    fit: Fit = True,
    run: RunOptions,
) -> None:
    """Draw PICTURE anew as PROMPT says (SDEdit): a photo or a scribble, noised and drawn again.

    With an InstructPix2Pix model PROMPT says what to change.
    """
    run = run.naming([prompt])
    run.check()
    check_writable(run.out)
    from latentdiff.editing import Differential, Instruct, SDEdit

    if soft_mask is not None and (mask is not None or repeats > 1):
        raise UserError("--soft-mask goes without --mask and --repeats.")
    soft = None if soft_mask is None else _soft(soft_mask, picture)
    whole = None if mask is None else mask_of(mask, picture)
    pipe, image = _begin(picture, run, fit)
    told = pipe.bundle.kind == "instruct-pix2pix"
    if image_guidance_scale is not None and not told:
        raise UserError("--image-guidance-scale is for InstructPix2Pix models; this is none.")
    if strength is None:
        strength = 1.0 if told else 0.6
    hole = None if whole is None else sized(whole, image)
    given = [image] if hole is None else [image, hole]
    edits: list[Edit | str] = [SDEdit(image, strength, repeats, hole)]
    about: dict[str, object] = {"edit": "SDEdit", "picture": picture.name, "fit": fit}
    if soft is not None and soft_mask is not None:
        soft = soft.resize(image.size)
        given.append(soft)
        edits = [Differential(image, soft, strength)]
        about |= {"edit": "Differential", "mask": soft_mask.name}
    about |= {"strength": strength, "repeats": repeats}
    if mask is not None:
        about["mask"] = Path(mask).name
    if told:
        scale = 1.5 if image_guidance_scale is None else image_guidance_scale
        edits.append(Instruct(image, scale))
        about |= {"edit": f"{about['edit']}, Instruct", "image_guidance_scale": scale}
    files = [picture, *([soft_mask] if soft_mask else mask_file(mask))]
    draw(pipe, edits, prompt, number, run, given if grid else None, about, files)
    times = f", {repeats} times" if repeats > 1 else ""
    steps = run.steps or pipe.bundle.num_inference_steps
    print(f"{int(steps * strength)} of {steps} steps{times}", file=sys.stderr)


@with_run_options
def inpaint(
    picture: Annotated[
        Path, typer.Argument(metavar="PICTURE", help="PNG, JPEG, WebP, BMP or AVIF.")
    ],
    prompt: Prompt,
    *,
    mask: Annotated[
        str,
        typer.Option(
            metavar="MASK",
            help="What to paint: FILE (white), box:x0,y0,x1,y1, or alpha: what is transparent.",
        ),
    ] = "alpha",
    extend: Annotated[
        str | None,
        typer.Option(
            metavar="SIDES", help="Paint beyond the borders, in place of a hole: left=64,top=32."
        ),
    ] = None,
    only_masked: Annotated[
        bool,
        typer.Option(
            "--only-masked",
            help="Work on the part around the hole at the model's size, and put it back into "
            "PICTURE at its own: for large pictures.",
        ),
    ] = False,
    margin: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Of --only-masked: what is seen beside the hole, in its sizes. Default: 0.5.",
        ),
    ] = None,
    jump_length: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of a RePaint jump back. Default: 1/25 of the run."),
    ] = None,
    resamples: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            help="RePaint's passes over each stretch; 1 is quick. Default: 10; an inpainting "
            "model, which sees the hole itself, uses RePaint only if told this or --jump-length.",
        ),
    ] = None,
    number: Number = 1,
    grid: Grid = False,
    fit: Fit = True,
    run: RunOptions,
) -> None:
    """Fill a hole in PICTURE with what PROMPT says. The rest stays, bit for bit.

    By RePaint; by the U-Net itself with an inpainting model, and by both if an option of RePaint is
    given.
    """
    run = run.naming([prompt])
    if margin is not None and not only_masked:
        raise UserError("--margin is of --only-masked: give both, or neither.")
    if only_masked and not fit:
        raise UserError("--no-fit is of the whole PICTURE: leave it out with --only-masked.")
    margin = 0.5 if margin is None else margin
    run.check()
    check_writable(run.out)
    from latentdiff.editing import Inpaint, Region, RePaint, extended
    from latentdiff.editing.region import read_extension
    from latentdiff.pictures import open_picture

    if run.control and (only_masked or extend):
        raise UserError("--control is of the whole PICTURE: leave out --only-masked and --extend.")
    if extend is None:
        whole, image = mask_of(mask, picture), open_picture(picture)
    else:
        if mask != "alpha":
            raise UserError("--mask and --extend: give one of them.")
        image, whole = extended(picture, **read_extension(extend))
    pipe = run.models.load(run.device, run.dtype, run.engine, run.attention)
    region = Region.around(image, whole, pipe.bundle.size, margin) if only_masked else None
    if region is not None:
        image, hole = region.image, region.mask
    else:
        image = fitted(image, picture.name, pipe) if fit else image
        hole = sized(whole, image)
    edits: list[Edit | str] = []
    about: dict[str, object] = {"picture": picture.name, "fit": fit}
    about |= {"extend": extend} if extend else {"mask": Path(mask).name}
    about |= {"only_masked": True, "margin": margin} if only_masked else {}
    seeing = pipe.bundle.kind == "inpainting"
    if seeing:
        edits.append(Inpaint(image, hole))
    if not seeing or jump_length is not None or resamples is not None:
        if resamples is None:
            resamples = 10
            print(
                f"RePaint goes {resamples} times through each stretch of the run, as its paper "
                "does; --resamples 1 is quick",
                file=sys.stderr,
            )
        edits.append(RePaint(image, hole, jump_length, resamples))
        about |= {"jump_length": jump_length, "resamples": resamples}
    about["edit"] = ", ".join(type(each).__name__ for each in edits)
    finish = None if region is None else region.paste
    given, files = [image, hole] if grid else None, [picture, *mask_file(mask)]
    draw(pipe, edits, prompt, number, run, given, about, files, finish)


@with_run_options
def ilvr(
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="PNG, JPEG, WebP, BMP or AVIF.")
    ],
    prompt: Prompt,
    *,
    factor: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Finest detail to hold: that of the picture shrunk by FACTOR. Default: 4 in "
            "latents, or as many pixels as they cover.",
        ),
    ] = None,
    until: Annotated[
        float, typer.Option(min=0, help="Hold nothing where sigma / alpha is below this.")
    ] = 0.0,
    space: Annotated[
        Literal["latents", "pixels"],
        typer.Option(help="Space in which it is held; pixels are slower."),
    ] = "latents",
    number: Number = 1,
    grid: Grid = False,
    fit: Fit = True,
    run: RunOptions,
) -> None:
    """Draw what PROMPT says with the coarse shapes and colours of REFERENCE (ILVR)."""
    run = run.naming([prompt])
    run.check()
    check_writable(run.out)
    from latentdiff.editing import ILVR

    pipe, image = _begin(reference, run, fit)
    edits: list[Edit | str] = [ILVR(image, factor, until, space)]
    about: dict[str, object] = {
        "edit": "ILVR",
        "picture": reference.name,
        "fit": fit,
        "factor": factor,
        "until": until,
        "space": space,
    }
    draw(pipe, edits, prompt, number, run, [image] if grid else None, about, [reference])


def _begin(picture: Path, run: RunOptions, fit: bool) -> "tuple[LatentDiffusionPipeline, Image]":
    """The model, and the picture at the size to work at; the picture is opened first."""
    from latentdiff import pictures

    image = pictures.open_picture(picture)
    pipe = run.models.load(run.device, run.dtype, run.engine, run.attention)
    return pipe, fitted(image, picture.name, pipe) if fit else image


def fitted(image: "Image", name: str, pipe: "LatentDiffusionPipeline") -> "Image":
    """Shrink a picture that is larger than the model's own, and say so."""
    from latentdiff.pictures import fit

    small = fit(image, max(pipe.bundle.size))
    if small is not image:
        print(
            "{} ({} x {}) is made {} x {} to fit the model; --no-fit keeps its size".format(
                shown(name), *image.size, *small.size
            ),
            file=sys.stderr,
        )
    return small


def mask_of(text: str, picture: Path) -> "Image":
    """A mask as large as the picture."""
    from latentdiff.editing.masks import box_mask, check_mask_size, mask_for
    from latentdiff.pictures import open_picture

    size = open_picture(picture).size
    if text == "alpha":
        mask = mask_for(picture, None)
    elif text.startswith("box:"):
        mask = mask_for(picture, box_mask(text.removeprefix("box:"), size))
    else:
        mask = mask_for(picture, Path(text))
    check_mask_size(mask, size)
    return mask


def mask_file(text: str | None) -> list[Path]:
    """The file of a mask, if it is one."""
    if text is None or text == "alpha" or text.startswith("box:"):
        return []
    return [Path(text)]


def _soft(file: Path, picture: Path) -> "Image":
    """A mask in greys, as large as the picture."""
    from latentdiff.editing.masks import check_mask_size, open_mask
    from latentdiff.pictures import open_picture

    mask, image = open_mask(file), open_picture(picture)
    check_mask_size(mask, image.size)
    return mask


def sized(mask: "Image", image: "Image") -> "Image":
    """A mask as large as the picture in use; any pixel of a hole is in it, however small."""
    from latentdiff.editing.masks import resize_mask

    return mask if mask.size == image.size else resize_mask(mask, image.size)


def draw(
    pipe: "LatentDiffusionPipeline",
    edits: "list[Edit | str]",
    prompt: str,
    number: int,
    run: RunOptions,
    given: "list[Image] | None",
    about: dict[str, object],
    files: Sequence[Path],
    finish: "Callable[[Image], Image] | None" = None,
) -> None:
    """Draw, finish, write each picture and the grid with what was given, and print the paths.

    `files` are those that `about` has the names of.
    """
    from latentdiff.editing import picture_size
    from latentdiff.pictures import grid, save_numbered_png, save_png
    from latentdiff.pipeline.record import about_request, png_text

    seed = seed_or_fresh(run.seed)
    request = replace(run.request(pipe.bundle, edits), seed=seed, first=run.first)

    def record() -> dict[str, object] | None:
        """Once a picture is drawn: by which engine is known then."""
        if run.no_metadata:
            return None
        told = {"prompt": prompt, "num_images_per_prompt": number} | about | run.about(files)
        return about_request(pipe.bundle, request) | told

    height, width = picture_size(edits, None, None) or pipe.bundle.size
    paths: list[Path] = []
    images: list[Image] = []
    size = round(height * width * run.enlargement)
    drawn = draw_in_parts(pipe, [prompt] * number, request, size, run.show(pipe.bundle))
    for place, (_, index, image) in enumerate(drawn):
        own = {"seed": seed, "index": index} | place_of(request, place)
        own.pop("first", None)
        text = png_text(record(), **own)
        whole = image if finish is None else finish(image)
        paths.append(save_numbered_png(whole, run.out, seed, text))
        if len(paths) == 1:  # not sooner: a refusal shall be the only line
            print(f"seed {seed}", file=sys.stderr)
        print(paths[-1], flush=True)
        images += [] if given is None else [image]
    if given is not None:
        sheet = grid([one.convert("RGB") for one in [*given, *images]], 8)
        path = paths[0].with_name(f"{paths[0].stem}-grid.png")
        print(save_png(sheet, path, png_text(record(), seed=seed)))

"""`latentdiff edit | inpaint | ilvr`: pictures out of words and another picture."""

import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from latentdiff.cli import options
from latentdiff.cli.models import about_loras, open_model
from latentdiff.cli.output import about_model, check_writable, png_text
from latentdiff.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentdiff.diffusion.sampling import Edit
    from latentdiff.pipeline import LatentDiffusionPipeline


def edit(
    picture: Annotated[
        Path, typer.Argument(metavar="PICTURE", help="PNG, JPEG, WebP, BMP or AVIF.")
    ],
    prompt: options.Prompt,
    strength: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="How far to go: 0 keeps it, 1 ignores it. Default: 0.6; with an InstructPix2Pix "
            "model, which sees it anyway, 1.",
        ),
    ] = None,
    image_guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="How closely an InstructPix2Pix model keeps to it; 1 is off. Default: 1.5."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="How often to do it.")] = 1,
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="MASK", help="Change only this: FILE (white), box:x0,y0,x1,y1, alpha."
        ),
    ] = None,
    number: options.Number = 1,
    seed: options.Seed = None,
    out: options.Out = Path("outputs"),
    grid: options.Grid = False,
    fit: options.Fit = False,
    steps: options.StepCount = 20,
    guidance_scale: options.GuidanceScale = 4.0,
    negative: options.Negative = None,
    also: options.AlsoPrompts = None,
    weights: options.Weights = False,
    solver: options.SolverName = None,
    timetable: options.TimetableName = None,
    model: options.Model = None,
    lora: options.Loras = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    no_metadata: options.NoMetadata = False,
) -> None:
    """Draw PICTURE anew as PROMPT says (SDEdit): a photo or a scribble, noised and drawn again.

    With an InstructPix2Pix model PROMPT says what to change.
    """
    check_writable(out)
    from latentdiff.editing import Instruct, SDEdit

    pipe, image = _begin(picture, model, lora, device, dtype, fit)
    told = pipe.bundle.kind == "instruct-pix2pix"
    if image_guidance_scale is not None and not told:
        raise UserError("--image-guidance-scale is for InstructPix2Pix models; this is none.")
    if strength is None:
        strength = 1.0 if told else 0.6
    hole = None if mask is None else _mask(mask, picture, image)
    run = _Run(
        prompt, number, steps, guidance_scale, negative, also or [], weights, solver, timetable
    )
    given = [image] if hole is None else [image, hole]
    edits: list[Edit] = [SDEdit(image, strength, repeats, hole)]
    about: dict[str, object] = {"edit": "SDEdit", "picture": picture.name, "fit": fit}
    about |= {"strength": strength, "repeats": repeats}
    if mask is not None:
        about["mask"] = Path(mask).name
    if told:
        scale = 1.5 if image_guidance_scale is None else image_guidance_scale
        edits.append(Instruct(image, scale))
        about |= {"edit": "SDEdit, Instruct", "image_guidance_scale": scale}
    _draw(
        pipe,
        edits,
        run,
        seed,
        given if grid else None,
        out,
        None if no_metadata else about | about_loras(lora),
    )
    times = f", {repeats} times" if repeats > 1 else ""
    print(f"{int(steps * strength)} of {steps} steps{times}", file=sys.stderr)


def inpaint(
    picture: Annotated[
        Path, typer.Argument(metavar="PICTURE", help="PNG, JPEG, WebP, BMP or AVIF.")
    ],
    prompt: options.Prompt,
    mask: Annotated[
        str,
        typer.Option(
            metavar="MASK",
            help="What to paint: FILE (white), box:x0,y0,x1,y1, or alpha: what is transparent.",
        ),
    ] = "alpha",
    jump_length: Annotated[
        int | None, typer.Option(min=1, help="Steps of a jump back. Default: 1/25 of the run.")
    ] = None,
    resamples: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            help="How often each stretch is drawn; 1 is quick. Default: 10; with an inpainting "
            "model, which sees the hole, the known part is not put back and nothing drawn again.",
        ),
    ] = None,
    number: options.Number = 1,
    seed: options.Seed = None,
    out: options.Out = Path("outputs"),
    grid: options.Grid = False,
    fit: options.Fit = False,
    steps: options.StepCount = 20,
    guidance_scale: options.GuidanceScale = 4.0,
    negative: options.Negative = None,
    also: options.AlsoPrompts = None,
    weights: options.Weights = False,
    solver: options.SolverName = None,
    timetable: options.TimetableName = None,
    model: options.Model = None,
    lora: options.Loras = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    no_metadata: options.NoMetadata = False,
) -> None:
    """Fill a hole in PICTURE with what PROMPT says. The rest stays, bit for bit.

    By RePaint; by the U-Net itself with an inpainting model, and by both if an option of RePaint is
    given.
    """
    check_writable(out)
    from latentdiff.editing import Inpaint, RePaint

    pipe, image = _begin(picture, model, lora, device, dtype, fit)
    hole = _mask(mask, picture, image)
    run = _Run(
        prompt, number, steps, guidance_scale, negative, also or [], weights, solver, timetable
    )
    edits: list[Edit] = []
    about: dict[str, object] = {"picture": picture.name, "fit": fit, "mask": Path(mask).name}
    seeing = pipe.bundle.kind == "inpainting"
    if seeing:
        edits.append(Inpaint(image, hole))
    if not seeing or jump_length is not None or resamples is not None:
        resamples = resamples or 10
        edits.append(RePaint(image, hole, jump_length, resamples))
        about |= {"jump_length": jump_length, "resamples": resamples}
    about["edit"] = ", ".join(type(each).__name__ for each in edits)
    given = [image, hole] if grid else None
    _draw(pipe, edits, run, seed, given, out, None if no_metadata else about | about_loras(lora))


def ilvr(
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="PNG, JPEG, WebP, BMP or AVIF.")
    ],
    prompt: options.Prompt,
    factor: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Finer detail than this is free. Default: 4 latents, or as many pixels as they "
            "cover.",
        ),
    ] = None,
    until: Annotated[
        float, typer.Option(min=0, help="Let go where sigma / alpha is below this.")
    ] = 0.0,
    space: Annotated[
        Literal["latents", "pixels"], typer.Option(help="What is held; pixels are slower.")
    ] = "latents",
    number: options.Number = 1,
    seed: options.Seed = None,
    out: options.Out = Path("outputs"),
    grid: options.Grid = False,
    fit: options.Fit = False,
    steps: options.StepCount = 20,
    guidance_scale: options.GuidanceScale = 4.0,
    negative: options.Negative = None,
    also: options.AlsoPrompts = None,
    weights: options.Weights = False,
    solver: options.SolverName = None,
    timetable: options.TimetableName = None,
    model: options.Model = None,
    lora: options.Loras = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    no_metadata: options.NoMetadata = False,
) -> None:
    """Draw what PROMPT says with the coarse shapes and colours of REFERENCE (ILVR)."""
    check_writable(out)
    from latentdiff.editing import ILVR

    pipe, image = _begin(reference, model, lora, device, dtype, fit)
    run = _Run(
        prompt, number, steps, guidance_scale, negative, also or [], weights, solver, timetable
    )
    edits = [ILVR(image, factor, until, space)]
    about = {
        "edit": "ILVR",
        "picture": reference.name,
        "fit": fit,
        "factor": factor,
        "until": until,
        "space": space,
    }
    _draw(
        pipe,
        edits,
        run,
        seed,
        [image] if grid else None,
        out,
        None if no_metadata else about | about_loras(lora),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """What is the same for all edits, by the pipeline's own names."""

    prompt: str
    num_images_per_prompt: int
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str | None
    also: list[str]
    prompt_weights: bool
    solver: str | None
    timetable: str | None


def _begin(
    picture: Path,
    model: str | None,
    loras: Sequence[str] | None,
    device: str,
    dtype: "options.DtypeName",
    fit: bool,
) -> "tuple[LatentDiffusionPipeline, Image]":
    """The model, and the picture at the size to work at."""
    from latentdiff import pictures

    image = pictures.open_picture(picture)
    pipe = open_model(model, device, dtype, loras)
    return pipe, pictures.fit(image, max(pipe.bundle.size)) if fit else image


def _mask(text: str, picture: Path, image: "Image") -> "Image":
    """A mask as large as the picture in use; any pixel of a hole is in it, however small."""
    from latentdiff.editing.masks import box_mask, mask_for, resize_mask
    from latentdiff.pictures import open_picture

    size = open_picture(picture).size
    if text == "alpha":
        mask = mask_for(picture, None)
    elif text.startswith("box:"):
        mask = mask_for(picture, box_mask(text.removeprefix("box:"), size))
    else:
        mask = mask_for(picture, Path(text))
    if mask.size != size:
        raise UserError(
            "the mask is {} x {} pixels, but the picture {} x {}.".format(*mask.size, *size)
        )
    return mask if size == image.size else resize_mask(mask, image.size)


def _draw(
    pipe: "LatentDiffusionPipeline",
    edits: "Sequence[Edit]",
    run: _Run,
    seed: int | None,
    given: "list[Image] | None",
    out: Path,
    about: dict[str, object] | None,
) -> None:
    """Draw, write each picture and the grid with what was given, and print the paths."""
    from latentdiff.pictures import grid, save_numbered_png, save_png

    seed = secrets.randbelow(2**32) if seed is None else seed
    output = pipe(**asdict(run), edits=edits, seed=seed, progress=sys.stderr.isatty())
    record = None
    if about is not None:
        record = about_model(pipe.bundle) | asdict(run) | about
        record["solver"] = run.solver or pipe.bundle.solver
        record["timetable"] = run.timetable or pipe.bundle.steps.spacing
    paths = [
        save_numbered_png(image, out, seed, png_text(record, seed=seed, index=index))
        for image, index in zip(output.images, output.indices, strict=True)
    ]
    print(f"seed {seed}", file=sys.stderr)
    if given is not None:
        sheet = grid([one.convert("RGB") for one in [*given, *output.images]], 8)
        path = paths[0].with_name(f"{paths[0].stem}-grid.png")
        paths.append(save_png(sheet, path, png_text(record, seed=seed)))
    print(*paths, sep="\n")

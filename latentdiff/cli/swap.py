"""`latentdiff swap`: a thing or its colour swapped for another in a picture."""

from pathlib import Path
from typing import Annotated

import typer

from latentdiff.cli import options
from latentdiff.cli.edit import fitted, mask_file, mask_of, sized
from latentdiff.cli.models import ModelOptions, hashed
from latentdiff.cli.output import check_writable


def swap(
    picture: Annotated[
        Path, typer.Argument(metavar="PICTURE", help="PNG, JPEG, WebP, BMP or AVIF.")
    ],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="What PICTURE shows.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="What it shall show.")],
    *,
    strength: Annotated[
        float,
        typer.Option(min=0, max=1, help="More changes shapes, too; less keeps more of PICTURE."),
    ] = 0.6,
    guidance_scale: Annotated[
        float, typer.Option(help="How far from SOURCE to TARGET; 1 is TARGET alone.")
    ] = 3.0,
    steps: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of steps of a whole run, each way.")
    ] = 30,
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="MASK", help="Change only this part: FILE (white), box:x0,y0,x1,y1, alpha."
        ),
    ] = None,
    out: options.Out = Path("outputs"),
    grid: options.Grid = False,
    fit: options.Fit = True,
    model: options.Model = None,
    vae: options.Vae = None,
    prediction: options.PredictionName = None,
    variant: options.Variant = None,
    lora: options.Loras = None,
    embedding: options.Embeddings = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    engine: options.Engine = "auto",
    attention: options.Attention = "auto",
    no_metadata: options.NoMetadata = False,
) -> None:
    """Draw PICTURE, which shows SOURCE, as TARGET: "a red car" as "a blue car".

    By inversion: PICTURE is followed back to its noise a part of the way, and drawn from there
    under TARGET, away from SOURCE. No noise is drawn, so there is no seed.
    """
    check_writable(out)
    from latentdiff import pictures
    from latentdiff.pipeline.prompts import check_prompts
    from latentdiff.pipeline.record import about_model, png_text
    from latentdiff.pipeline.swapping import swapped

    check_prompts([source, target])
    image = pictures.open_picture(picture)
    hole = None if mask is None else mask_of(mask, picture)
    models = ModelOptions(model, vae, prediction, variant, lora, embedding)
    models.check()
    pipe = models.load(device, dtype, engine, attention)
    image = fitted(image, picture.name, pipe) if fit else image
    hole = None if hole is None else sized(hole, image)
    drawn = swapped(
        pipe,
        image,
        source,
        target,
        strength=strength,
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        mask=hole,
    )
    record = about_model(pipe.bundle) | {"edit": "swap", "picture": picture.name, "fit": fit}
    record |= {"source": source, "num_inference_steps": steps, "strength": strength}
    record |= {"guidance_scale": guidance_scale, "solver": "heun", "timetable": "karras"}
    record |= {} if mask is None else {"mask": Path(mask).name}
    text = None
    if not no_metadata:
        files = hashed([picture, *mask_file(mask), *models.files])
        text = png_text(record | models.about() | files, prompt=target)
    paths = [pictures.save_numbered_png(drawn, out, 0, text)]
    if grid:
        path = paths[0].with_name(f"{paths[0].stem}-grid.png")
        given = [image] if hole is None else [image, hole.convert("RGB")]
        paths.append(pictures.save_png(pictures.grid([*given, drawn], 8), path, text))
    print(*paths, sep="\n")

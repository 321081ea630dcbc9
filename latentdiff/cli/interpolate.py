"""`latentdiff interpolate`: the way from one picture or prompt to another."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.cli import options
from latentdiff.cli.edit import fitted
from latentdiff.cli.models import ModelOptions, hashed
from latentdiff.cli.output import check_writable
from latentdiff.errors import UserError


def interpolate(
    a: Annotated[str, typer.Argument(metavar="A", help="A picture file, or a prompt.")],
    b: Annotated[str, typer.Argument(metavar="B", help="A second picture file or prompt.")],
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Prompt for both pictures.")
    ] = None,
    number: Annotated[
        int, typer.Option("-n", "--number", min=2, max=64, help="Pictures, A and B included.")
    ] = 7,
    seed: Annotated[
        int | None,
        typer.Option(
            min=-1,
            max=options.MAX_SEED,
            help="Seed of the noise between prompts; -1 is a fresh one. Default: 0.",
        ),
    ] = None,
    out: options.Out = Path("outputs"),
    grid: options.Grid = False,
    fit: options.Fit = True,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Default: 20 between prompts, 50 between pictures."),
    ] = None,
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
    """Draw the way from A to B: between two pictures (inverted to noise) or two prompts."""
    check_writable(out)
    files = [_is_file(one) for one in (a, b)]
    if files[0] != files[1]:
        raise UserError(f"{a} and {b}: two picture files or two prompts are needed.")
    for one in () if files[0] else (a, b):
        if Path(one).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            raise UserError(f"{one}: no such picture.")
    if files[0] and prompt is None:
        raise UserError("say with --prompt what both pictures show.")
    if prompt is not None and not files[0]:
        raise UserError("--prompt is for two pictures: two prompts say themselves what they show.")
    if seed is not None and files[0]:
        raise UserError("--seed is for two prompts: pictures are inverted to noise of their own.")
    from latentdiff import pictures
    from latentdiff.pipeline import interpolation
    from latentdiff.pipeline.record import about_model, png_text

    names = [Path(one).name for one in (a, b)]
    ends = [pictures.open_picture(Path(one)) for one in (a, b)] if files[0] else []
    models = ModelOptions(model, vae, prediction, variant, lora, embedding)
    models.check()
    seed = options.seed_or_fresh(seed or 0)
    pipe = models.load(device, dtype, engine, attention)
    weights = [k / (number - 1) for k in range(number)]
    if steps is None:
        steps = interpolation.STEPS_OF_PICTURES if files[0] else interpolation.STEPS_OF_PROMPTS
    if prompt is not None and files[0]:
        if fit:
            ends = [fitted(end, name, pipe) for end, name in zip(ends, names, strict=True)]
        drawn = interpolation.between_pictures(
            pipe, ends[0], ends[1], weights, prompt=prompt, num_inference_steps=steps
        )
    else:
        drawn = interpolation.between_prompts(
            pipe, a, b, weights, num_inference_steps=steps, seed=seed
        )
    images = [pictures.to_pil(one * 2 - 1) for one in drawn]
    record = about_model(pipe.bundle) | {"between": names if files[0] else [a, b]}
    record |= {"fit": fit} if files[0] else {}
    record["steps"] = steps
    record |= models.about()
    kept = None
    if not no_metadata:
        own = {"prompt": prompt} if files[0] else {"seed": seed}
        read = [Path(a), Path(b)] if files[0] else []
        kept = record | own | hashed([*read, *models.files])
    paths = [
        pictures.save_numbered_png(image, out, seed, png_text(kept, weight=weight))
        for image, weight in zip(images, weights, strict=True)
    ]
    if not files[0]:
        print(f"seed {seed}", file=sys.stderr)
    if grid:
        path = paths[0].with_name(f"{paths[0].stem}-grid.png")
        paths.append(pictures.save_png(pictures.grid(images, 8), path, png_text(kept)))
    print(*paths, sep="\n")


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a name, so a prompt
        return False

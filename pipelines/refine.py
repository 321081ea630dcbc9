"""A picture by two models: a base draws most of the way, a refiner the rest.

    python pipelines/refine.py "a red heart" --base models/sdxl --refiner models/sdxl-refiner

The two have the same latents and noise schedule, as the base and the refiner of Stable Diffusion
XL; at a noise level the base hands its latents over.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from PIL import Image

from latentdiff import DenoisingEnd, DenoisingStart, LatentDiffusionPipeline, Request, UserError
from latentdiff.pictures import save_png


def refine(base: str, refiner: str, request: Request, at: float) -> list[Image.Image]:
    """Pictures of a request, drawn by a base down to a level and by a refiner from there.

    Each is run as its makers meant it, and one is in memory at a time.

    Args:
        base, refiner: folders, files or hub ids.
        request: for both.
        at: the part of the way that the base draws, 0..1.

    Raises:
        UserError: an argument is out of range, or the models do not fit each other.
    """
    first = LatentDiffusionPipeline.from_pretrained(base)
    _, levels = first.bundle.plan(request.num_inference_steps)
    latents = first.draw(replace(request, edits=[DenoisingEnd(at)]), output_type="latent").latents
    del first
    second = LatentDiffusionPipeline.from_pretrained(refiner)
    if list(second.bundle.plan(request.num_inference_steps)[1]) != list(levels):
        raise UserError(f"{refiner}: its noise levels are not those of {base}.")
    return second.draw(replace(request, edits=[DenoisingStart(latents, at)])).images


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw one picture with a base and a refiner.")
    parser.add_argument("prompt")
    parser.add_argument("--base", required=True, help="a folder, a file or a hub id")
    parser.add_argument("--refiner", required=True, help="likewise")
    parser.add_argument("--at", type=float, default=0.8, help="the base's part of the way, 0..1")
    parser.add_argument("--steps", type=int, default=40, help="of both together")
    parser.add_argument("--negative", help="what not to draw")
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    given = parser.parse_args()
    request = Request(
        prompt=given.prompt,
        negative_prompt=given.negative,
        num_inference_steps=given.steps,
        guidance_scale=given.guidance_scale,
        seed=given.seed,
    )
    try:
        (picture,) = refine(given.base, given.refiner, request, given.at)
        print(save_png(picture, given.out))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

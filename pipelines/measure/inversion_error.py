"""Measure how well a picture is recovered from its inverted noise, on the bundled model.

    python pipelines/measure/inversion_error.py

A scribble, and pictures that the model draws, are inverted in 50 steps without guidance and drawn
again with the same solver. Told is the PSNR against the autoencoder's own reconstruction, which is
as near as any run can come.
"""

import argparse

import torch
from PIL import Image, ImageDraw

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.metrics.psnr import psnr
from latentdiff.pictures import to_tensor

PROMPTS = ("a red heart", "a cat face")
SETTINGS = (("heun", 0), ("heun", 1), ("heun", 3), ("dpm-solver-2", 1), ("ddim", 1))


def scribble() -> Image.Image:
    """A red disc, flat and hard-edged, as no emoji is."""
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((24, 24, 103, 103), fill=(220, 30, 40))
    return image


def there_and_back(
    pipe: LatentDiffusionPipeline, picture: Image.Image, prompt: str, solver: str, refinements: int
) -> float:
    """PSNR in dB."""
    noise = pipe.invert(picture, prompt, solver=solver, refinements=refinements)
    back = pipe(
        prompt,
        latents=noise,
        num_inference_steps=50,
        guidance_scale=1,
        solver=solver,
        timetable="karras",
        output_type="pt",
        progress=False,
    )
    with torch.no_grad():
        known = pipe.bundle.autoencoder.decode(
            pipe.bundle.autoencoder.encode(to_tensor(picture)[None])
        )
    return psnr(back.images * 2 - 1, known.clamp(-1, 1)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure inversion and return.")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    try:
        pipe = LatentDiffusionPipeline.from_pretrained(parser.parse_args().model, dtype="float32")
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    pictures = {"a red circle": scribble()}
    for prompt in PROMPTS:
        pictures[prompt] = pipe(prompt, seed=0, progress=False).images[0]
    print("| solver | refinements | " + " | ".join(pictures) + " |")
    print("|---" * (2 + len(pictures)) + "|")
    for solver, refinements in SETTINGS:
        scores = [
            f"{there_and_back(pipe, picture, prompt, solver, refinements):.1f}"
            for prompt, picture in pictures.items()
        ]
        print(f"| `{solver}` | {refinements} | {' | '.join(scores)} |", flush=True)


if __name__ == "__main__":
    main()

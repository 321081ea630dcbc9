"""A picture out of words, every part of the run in sight.

    python pipelines/text_to_image.py "a red heart" --seed 7 --out heart.png

`LatentDiffusionPipeline` does the same in one call, for many prompts and with checks. Start from
this file where a part shall be another one: each line of `draw` can be replaced by its like.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from latentdiff import UserError, solvers
from latentdiff.bundle import Bundle
from latentdiff.diffusion.denoiser import conditioned_denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.sampling import sample
from latentdiff.guidance import classifier_free
from latentdiff.pictures import save_png, to_pil


@torch.no_grad()
def draw(bundle: Bundle, prompt: str, *, steps: int, guidance_scale: float, seed: int) -> Tensor:
    """One picture [1, 3, H, W], about [-1, 1]."""
    # Words become the network's condition. The empty prompt is what guidance steers away from.
    condition = bundle.conditioner.encode([prompt, ""], bundle.size).condition
    positive, negative = condition.take([0]), condition.take([1])

    # The network becomes a denoiser: (x_t, level) -> x_0. Guidance makes another denoiser of it.
    denoise = conditioned_denoiser(bundle.network, bundle.process, bundle.prediction)
    guided = classifier_free(denoise, positive, negative, scale=guidance_scale)

    # The noise levels to visit, from noise to data, and how to step from one to the next.
    timetable = bundle.timetable(None, steps)  # the model's own; or "karras", ...
    solver = solvers.create("dpmpp-2m")

    # The run begins with noise at the first level, and ends with latents, which are decoded.
    height, width = bundle.size
    noise = NoiseStreams(seed)
    x = noise.draw((bundle.latent_channels, height // bundle.factor, width // bundle.factor))
    x = x.to(bundle.device) * bundle.process.prior_scale(timetable[0])
    x = sample(guided, solver, timetable, x, noise=noise)
    return bundle.autoencoder.decode(x)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw one picture, by hand.")
    parser.add_argument("prompt")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    given = parser.parse_args()
    try:
        picture = draw(
            Bundle.load(given.model),
            given.prompt,
            steps=given.steps,
            guidance_scale=given.guidance_scale,
            seed=given.seed,
        )
        print(save_png(to_pil(picture[0]), given.out))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

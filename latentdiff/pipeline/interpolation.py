"""The way from one picture or prompt to another."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from latentdiff.diffusion.inversion import slerp
from latentdiff.diffusion.solver import Solver
from latentdiff.errors import UserError
from latentdiff.pictures import Picture, open_picture
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.arguments import seed_of
from latentdiff.pipeline.prompts import check_prompts

STEPS_OF_PICTURES, STEPS_OF_PROMPTS = 50, 20


def between_pictures(
    pipe: LatentDiffusionPipeline,
    a: Picture,
    b: Picture,
    weights: Sequence[float],
    *,
    prompt: str,
    num_inference_steps: int = STEPS_OF_PICTURES,
) -> Tensor:
    """Pictures between two: both are inverted, and what lies between their noises is drawn.

    Args:
        pipe: the model.
        a, b: pictures of one size.
        weights: one for each picture to draw; 0 is a, 1 is b.
        prompt: what both show.
        num_inference_steps: steps of each inversion and of the run.

    Returns:
        [N, 3, H, W] in [0, 1].

    Raises:
        UserError: the pictures are of two sizes, or see `LatentDiffusionPipeline.invert`.
    """
    width, height = open_picture(a).size
    if open_picture(b).size != (width, height):
        raise UserError("the two pictures must be of one size: resize one of them.")
    if not weights:
        raise UserError("weights: name at least one place between the pictures.")
    start = pipe.invert(a, prompt, num_inference_steps=num_inference_steps)
    end = pipe.invert(b, prompt, num_inference_steps=num_inference_steps)
    sides = [side * pipe.bundle.factor for side in start.shape[-2:]]
    output = pipe(
        prompt,
        latents=torch.cat([slerp(start, end, weight) for weight in weights]),
        num_images_per_prompt=len(weights),
        num_inference_steps=num_inference_steps,
        height=sides[0],
        width=sides[1],
        guidance_scale=1,
        solver="heun",
        timetable="karras",
        seed=0,
        output_type="pt",
        progress=False,
    )
    return output.images[..., :height, :width]


def between_prompts(
    pipe: LatentDiffusionPipeline,
    a: str,
    b: str,
    weights: Sequence[float],
    *,
    num_inference_steps: int = STEPS_OF_PROMPTS,
    guidance_scale: float | None = None,
    solver: str | Solver | None = None,
    seed: int = 0,
) -> Tensor:
    """Pictures between two prompts: one noise, and text states between theirs.

    Args:
        pipe: the model.
        a, b: the prompts.
        weights: one for each picture to draw; 0 is a, 1 is b.
        num_inference_steps: steps of the run.
        guidance_scale: 1 is off; None is 4.
        solver: None is the model's own.
        seed: seed of the noise, the same for all; -1 is a fresh one.

    Returns:
        [N, 3, H, W] in [0, 1].

    Raises:
        UserError: an empty prompt, or no step.
    """
    if not weights:
        raise UserError("weights: name at least one place between the prompts.")
    bundle = pipe.bundle
    with torch.no_grad():
        encoded = bundle.conditioner.encode([*check_prompts([a, b]), ""], bundle.size).condition
    encoded = replace(encoded, sizes=None)  # the pipeline tells the network its own
    between = {
        name: torch.cat([slerp(value[:1], value[1:2], weight) for weight in weights])
        if value.is_floating_point()
        else value[:2].any(0, keepdim=True).expand(len(weights), *value.shape[1:])
        for name, value in encoded.given().items()
    }
    output = pipe(
        prompt_embeds=replace(encoded, **between),
        negative_prompt_embeds=encoded.take([2]),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        solver=solver,
        seed=[seed_of(seed)] * len(weights),
        output_type="pt",
        progress=False,
    )
    return output.images

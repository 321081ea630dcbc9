"""The way from one picture or prompt to another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.diffusion.denoiser import Condition, conditioned_denoiser
from latentdiff.diffusion.inversion import slerp
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.sampling import sample
from latentdiff.errors import UserError
from latentdiff.guidance import classifier_free
from latentdiff.pictures import Picture, open_picture
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.prompts import check_prompts
from latentdiff.solvers import DPMpp2M, Solver


def between_pictures(
    pipe: LatentDiffusionPipeline,
    a: Picture,
    b: Picture,
    weights: Sequence[float],
    *,
    prompt: str,
    num_inference_steps: int = 50,
) -> Tensor:
    """Pictures between two: both are inverted, and what lies between their noises is drawn.

    Args:
        pipe: the model.
        a, b: pictures of one size.
        weights: one for each picture to draw; 0 is a, 1 is b.
        prompt: what both show.
        num_inference_steps: of each inversion and of the run.

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


@torch.no_grad()
def between_prompts(
    bundle: Bundle,
    a: str,
    b: str,
    weights: Sequence[float],
    *,
    num_inference_steps: int = 20,
    guidance_scale: float = 4.0,
    solver: Solver | None = None,
    seed: int = 0,
) -> Tensor:
    """Pictures between two prompts: one noise, and text states between theirs.

    Args:
        bundle: the model.
        a, b: the prompts.
        weights: one for each picture to draw; 0 is a, 1 is b.
        num_inference_steps: of the run.
        guidance_scale: 1 is off.
        solver: None is DPM-Solver++(2M).
        seed: of the noise, the same for all.

    Returns:
        [N, 3, H, W] in [0, 1].

    Raises:
        UserError: an empty prompt, or no step.
    """
    if not weights:
        raise UserError("weights: name at least one place between the prompts.")
    text = bundle.text.encode([*check_prompts([a, b]), ""])
    first, last, empty = text.states.split(1)
    positive: dict[str, Tensor] = {
        "states": torch.cat([slerp(first, last, weight) for weight in weights])
    }
    negative: dict[str, Tensor] = {"states": empty.expand(len(weights), -1, -1)}
    if text.mask is not None:
        seen = (text.mask[0] | text.mask[1])[None]
        positive["mask"] = seen.expand(len(weights), -1)
        negative["mask"] = text.mask[2:].expand(len(weights), -1)
    x = _run(
        bundle, positive, negative, num_inference_steps, guidance_scale, solver or DPMpp2M(), seed
    )
    return (bundle.decode(x) / 2 + 0.5).clamp(0, 1)


def _run(
    bundle: Bundle,
    positive: Condition,
    negative: Condition,
    steps: int,
    guidance_scale: float,
    solver: Solver,
    seed: int,
) -> Tensor:
    denoise = classifier_free(
        conditioned_denoiser(bundle.network(), bundle.process, bundle.prediction),
        positive,
        negative,
        scale=guidance_scale,
    )
    timetable = bundle.timetable(None, steps)
    noise = NoiseStreams.of([(seed, 0)] * len(positive["states"]))
    height, width = bundle.size
    shape = (bundle.latent_channels, height // bundle.factor, width // bundle.factor)
    x = noise.draw(shape).to(bundle.device) * bundle.process.prior_scale(timetable[0])
    return sample(denoise, solver, timetable, x, noise=noise)

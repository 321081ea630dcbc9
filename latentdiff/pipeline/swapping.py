"""A thing or its colour swapped for another, with the rest of a picture as it was."""

from PIL import Image

from latentdiff.editing.masks import mask_like, mask_tensor, open_mask, paste
from latentdiff.errors import UserError
from latentdiff.pictures import Picture, open_picture, to_pil, to_tensor
from latentdiff.pipeline.arguments import MAX_STEPS, whole
from latentdiff.pipeline.latent_diffusion import LatentDiffusionPipeline


def swapped(
    pipe: LatentDiffusionPipeline,
    picture: Picture,
    source: str,
    target: str,
    *,
    strength: float = 0.6,
    guidance_scale: float = 3.0,
    num_inference_steps: int = 30,
    mask: Picture | None = None,
) -> Image.Image:
    """A picture of `source` as one of `target`: "a red car" as "a blue car".

    The picture is inverted a part of the way, under the source: Song et al. 2021 (DDIM), section
    4.3, with `latentdiff.diffusion.inversion`. From there it is drawn under the target, guided away
    from the source: Ho & Salimans 2021, eq. 6, with the source in place of no prompt. What both
    prompts say alike cancels, so that the rest stays. No noise is drawn: the same call gives the
    same picture.

    Args:
        pipe: the model.
        picture: any picture; its sides are padded to multiples of the autoencoder's factor.
        source: what it shows.
        target: what it shall show.
        strength: the part of the run that is inverted and drawn, above 0 and up to 1: more changes
            shapes, too.
        guidance_scale: how far from the source to the target; 1 is the target alone.
        num_inference_steps: of a whole run, each way, by Heun's method.
        mask: where it may change (white): a picture of the same size; elsewhere pixels stay, bit
            for bit. None: anywhere.

    Raises:
        UserError: no picture, an empty prompt, or a number out of range.
    """
    image = open_picture(picture)
    hole = None if mask is None else mask_like(open_mask(mask), image)
    if not 0 < strength <= 1:
        raise UserError(f"strength must lie above 0 and up to 1, not {strength}.")
    steps = whole(num_inference_steps, "num_inference_steps", 1, MAX_STEPS)
    levels = pipe.bundle.timetable("karras", steps)
    made = int(steps * strength)
    if made < 2:
        raise UserError(
            f"strength {strength} of {steps} steps is less than two steps: take more of either."
        )
    late = levels[-1 - made :]
    noise = pipe.invert(image, source, timetable=late)
    factor = pipe.bundle.factor
    drawn = pipe(
        target,
        negative_prompt=source,
        latents=noise,
        height=noise.shape[2] * factor,
        width=noise.shape[3] * factor,
        solver="heun",
        timetable=late,
        guidance_scale=guidance_scale,
        seed=0,
        output_type="pt",
        progress=False,
    )
    painted = drawn.images[..., : image.height, : image.width] * 2 - 1
    if hole is not None:
        painted = paste(painted, to_tensor(image)[None], mask_tensor(hole), factor)
    return to_pil(painted[0])

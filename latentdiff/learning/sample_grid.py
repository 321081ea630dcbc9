"""A grid of pictures that shows in the middle of a training run what the model draws by now."""

from collections.abc import Sequence

from PIL import Image

from latentdiff.bundle import Bundle
from latentdiff.data.examples import Example
from latentdiff.learning.accumulate import in_parts
from latentdiff.learning.config import ModelRunConfig
from latentdiff.learning.run import Run
from latentdiff.learning.sharding import Shown
from latentdiff.pictures import grid
from latentdiff.pipeline import LatentDiffusionPipeline


def sample_grid(
    bundle: Bundle,
    prompts: Sequence[str],
    examples: Sequence[Example],
    seed: int,
    *,
    steps: int = 20,
    scale: float | None = None,
) -> Image.Image:
    """Draw prompts, eight in a row; fewer at once where memory runs out, with the same pictures.

    Args:
        prompts: what to draw; where there are none, the first captions of the first 16 examples.
        seed: picture i has stream i of it.
        steps: of the model's own solver.
        scale: of guidance; None takes the pipeline's default.
    """
    wanted = prompts or [example.captions[0] for example in examples[:16]]
    pipe = LatentDiffusionPipeline(bundle)

    def draw(places: Sequence[int]) -> list[Image.Image]:
        return pipe(
            [wanted[place] for place in places],
            seed=seed,
            first=places[0],
            num_inference_steps=steps,
            guidance_scale=scale,
            progress=False,
        ).images

    return grid(list(in_parts(range(len(wanted)), len(wanted), draw)), 8)


def record_samples(
    run: Run,
    step: int,
    shown: Shown,
    config: ModelRunConfig,
    examples: Sequence[Example],
    *,
    steps: int,
    scale: float | None = None,
) -> None:
    """Record `sample_grid` of the configured prompts; every process of the run must ask.

    Args:
        run: whose record it is.
        step: of the training.
        shown: the model.
        config: has the prompts and the seed.
        examples, steps, scale: see `sample_grid`.
    """
    with shown.whole() as bundle:
        if run.main:
            prompts, seed = config.sample_prompts, config.seed
            drawn = sample_grid(bundle, prompts, examples, seed, steps=steps, scale=scale)
            run.picture(step, "samples", drawn)

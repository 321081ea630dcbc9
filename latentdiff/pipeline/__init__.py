"""One call: words in, pictures out."""

from latentdiff.pipeline.controls import Control
from latentdiff.pipeline.image_prompts import ImagePrompt
from latentdiff.pipeline.latent_diffusion import LatentDiffusionPipeline
from latentdiff.pipeline.output import PipelineOutput
from latentdiff.pipeline.request import Request
from latentdiff.pipeline.run import Run

__all__ = [
    "Control",
    "ImagePrompt",
    "LatentDiffusionPipeline",
    "PipelineOutput",
    "Request",
    "Run",
]

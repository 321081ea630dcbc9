"""One call: words in, pictures out."""

from latentdiff.pipeline.latent_diffusion import LatentDiffusionPipeline, PipelineOutput

__all__ = ["LatentDiffusionPipeline", "PipelineOutput"]

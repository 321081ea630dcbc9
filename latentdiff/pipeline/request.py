"""The arguments of one call, as a value: from Python, a command line, a server or a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.edits import Edit
from latentdiff.diffusion.solver import Solver
from latentdiff.diffusion.timetable import Timetable
from latentdiff.guidance.methods import Method, default_scale
from latentdiff.models.conditioner import SizeConditions
from latentdiff.models.guidance_embedding import DISTILLED_SCALE
from latentdiff.models.network import Network
from latentdiff.models.text_encoders import Reading
from latentdiff.pipeline.controls import Control
from latentdiff.pipeline.image_prompts import ImagePrompt
from latentdiff.pipeline.prompt_syntax import Syntax
from latentdiff.pipeline.prompts import Also


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """The arguments of a call; `LatentDiffusionPipeline.__call__` explains each of them."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    prompt_embeds: Tensor | Condition | None = None
    negative_prompt_embeds: Tensor | Condition | None = None
    also: Sequence[Also] = ()
    prompt_weights: bool = False
    long_prompts: bool = False
    prompt_syntax: Syntax = "plain"
    clip_skip: int | None = None
    height: int | None = None
    width: int | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    num_inference_steps: int = 20
    guidance: str | Method = "cfg"
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, math.inf)
    solver: str | Solver | None = None
    timetable: str | Timetable | None = None
    num_images_per_prompt: int = 1
    seed: int | Sequence[int] | None = None
    first: int = 0
    variation_seed: int | Sequence[int] | None = None
    variation_strength: float = 0.0
    generator: torch.Generator | None = None
    latents: Tensor | None = None
    edits: Sequence[Edit | str] = ()
    controls: Sequence[Control] = ()
    image_prompts: Sequence[ImagePrompt] = ()

    @property
    def sizes(self) -> SizeConditions:
        """What the network is told of the pictures, where it is told sizes."""
        return SizeConditions(
            original_size=self.original_size,
            crop=self.crop,
            target_size=self.target_size,
            aesthetic_score=self.aesthetic_score,
            negative_aesthetic_score=self.negative_aesthetic_score,
        )

    @property
    def scale(self) -> float:
        """The guidance scale, or that of the method itself where none was given."""
        given = self.guidance_scale
        return default_scale(self.guidance) if given is None else given

    def scale_for(self, network: Network) -> float:
        """The guidance scale; where none was given, that of the method, or of a distilled network
        as which it is told."""
        distilled = self.guidance_scale is None and network.guidance_width is not None
        return DISTILLED_SCALE if distilled else self.scale

    @property
    def reading(self) -> Reading:
        """How its texts are read; A1111's syntax brings weights and long prompts along."""
        theirs = self.prompt_syntax == "a1111"
        weights = "comfyui" if self.prompt_weights else "a1111" if theirs else None
        return Reading(weights, self.long_prompts or theirs, self.clip_skip or 0)

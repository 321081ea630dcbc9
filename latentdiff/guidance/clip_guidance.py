"""CLIP guidance: the gradient of how well decoded estimates agree with a text."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.editing.run_context import Finish, RunContext, unchanged
from latentdiff.errors import UserError
from latentdiff.guidance.clip import Clip
from latentdiff.guidance.gradient import from_estimate

Score = Callable[[Tensor], Tensor]
"""x_0 [B, C, h, w] -> [B], a log-probability up to a constant."""


@dataclass(frozen=True, slots=True)
class ClipGuide:
    """CLIP guidance: the score of a text and the decoded x_0; see `from_estimate`.

    The score is CLIP's own logit, cosine times temperature, so scale 1 is CLIP's own say. Its
    gradient goes through the autoencoder's decoder, and by option through the network.

    Attributes:
        clip: on the device of the model that draws.
        scale: strength; 0 is off.
        text: what the pictures shall show; None for their prompts.
        through: True for a gradient through the network, too: about twice the cost.
        interval: range of sigma / alpha, above the first and up to the second.
        score: of an estimate; the pipeline puts it there.
    """

    clip: Clip
    scale: float = 1.0
    text: str | None = None
    through: bool = False
    interval: tuple[float, float] = (0.0, math.inf)
    score: Score | None = None

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """The guide with the texts of the run, encoded.

        Raises:
            UserError: no text, and a run of ready-made states in place of prompts.
        """
        if self.text is None and "" in context.prompts:
            raise UserError("CLIP guidance needs a prompt in words, or a text of its own.")
        texts = self.clip.texts(context.prompts if self.text is None else [self.text])
        temperature, decode = self.clip.temperature, context.autoencoder.decode

        def score(x0: Tensor) -> Tensor:
            return temperature * self.clip.score(decode(x0), texts).to(x0.device)

        return replace(self, score=score), unchanged

    def denoiser(self, denoise: Denoiser) -> Denoiser:
        """See `EditsDenoiser`.

        Raises:
            UserError: it is not bound to a run, so that nothing decodes the estimates.
        """
        if self.score is None:
            raise UserError("CLIP guidance needs an autoencoder: run it in the pipeline.")
        return from_estimate(
            denoise,
            self.score,
            strength=self.scale,
            through=self.through,
            interval=self.interval,
        )

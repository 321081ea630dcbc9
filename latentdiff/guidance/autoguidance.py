"""Autoguidance: away from what a worse version of the model says."""

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.diffusion.denoiser import Denoiser, Estimate, bind, conditioned_denoiser
from latentdiff.diffusion.process import NoiseLevel, agree
from latentdiff.editing.run_context import Finish, RunContext, unchanged
from latentdiff.errors import UserError, check_finite
from latentdiff.models.guidance_embedding import told_scale


def from_weaker(strong: Denoiser, weak: Denoiser, *, scale: float) -> Denoiser:
    """Guide away from a weaker denoiser: x_0 = weak + scale (strong - weak).

    Karras et al. 2024 (Guiding a Diffusion Model with a Bad Version of Itself), eq. 5. A scale of 1
    is off: only the strong one runs then.

    Raises:
        UserError: a scale that is not finite.
    """
    check_finite(scale, "autoguidance: scale")
    if scale == 1:
        return strong

    def guided(x: Tensor, level: NoiseLevel) -> Estimate:
        away, towards = weak(x, level), strong(x, level)
        return towards.with_x0(away.x0 + scale * (towards.x0 - away.x0))

    return guided


@dataclass(frozen=True, slots=True, eq=False)
class Autoguidance:
    """Autoguidance by a weaker model of the same latents: see `from_weaker`.

    The weaker model (smaller, or trained for less time) is asked under the positive prompts. It
    acts on what the other guidance of the run gives; with guidance_scale=1 it is the only one.

    Attributes:
        weak: a weaker model with the latents and process of the one that draws, on its device.
        scale: strength; 1 is off, about 2 their choice.
        denoise: the weak model under the prompts of a run; the pipeline puts it there.

    Raises:
        UserError: a scale that is not finite, or a model that sees more than x_t.
    """

    weak: Bundle
    scale: float = 2.0
    denoise: Denoiser | None = None

    def __post_init__(self) -> None:
        check_finite(self.scale, "autoguidance: scale")
        if self.weak.kind != "text-to-image":
            raise UserError(f"autoguidance needs a text-to-image model, not {self.weak.kind}.")

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """The guide with its model's condition of the prompts.

        Raises:
            UserError: the model has other latents, or another process, than the one that draws; or
                the run has ready-made states in place of prompts.
        """
        weak, drawing = self.weak, context.autoencoder
        if (weak.latent_channels, weak.factor) != (drawing.channels, drawing.factor):
            raise UserError(
                f"autoguidance: {weak.name} has latents of {weak.latent_channels} channels and "
                f"factor {weak.factor}, the model that draws of {drawing.channels} and "
                f"{drawing.factor}."
            )
        if context.process is None or not agree(weak.process, context.process):
            raise UserError(f"autoguidance: {weak.name} was trained on another process.")
        if "" in context.prompts:
            raise UserError("autoguidance needs the prompt in words, and not as prompt_embeds.")
        encoded = weak.conditioner.encode(context.prompts, context.padded)
        condition = told_scale(encoded.condition, weak.network, 1.0)
        conditioned = conditioned_denoiser(weak.network, weak.process, weak.prediction)
        return replace(self, denoise=bind(conditioned, condition)), unchanged

    def denoiser(self, denoise: Denoiser) -> Denoiser:
        """See `EditsDenoiser`.

        Raises:
            UserError: it is not bound to a run, so that nothing encodes its prompts.
        """
        if self.denoise is None:
            raise UserError("autoguidance needs prompts: run it in the pipeline.")
        return from_weaker(denoise, self.denoise, scale=self.scale)

"""Classifier guidance: the gradient of a classifier of noised latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser, Estimate
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.editing.run_context import Finish, RunContext, unchanged
from latentdiff.errors import UserError, check_finite
from latentdiff.guidance.classifier import Classifier


def from_classifier(
    denoise: Denoiser,
    log_probability: Callable[[Tensor, NoiseLevel], Tensor],
    *,
    strength: float,
) -> Denoiser:
    """Classifier guidance: Dhariwal & Nichol 2021, algorithm 1.

    The score becomes score + strength grad ln p(y | x_t); in x_0 that adds strength sigma^2 / alpha
    times the gradient. Of pure noise no classifier can tell anything: there, nothing is added.

    Args:
        denoise: the denoiser to guide.
        log_probability: (x_t [B, C, H, W], level) -> ln p(y | x_t) [B], differentiable in x_t.
        strength: 0 is off.

    Raises:
        UserError: a strength that is not finite.
    """
    check_finite(strength, "classifier guidance: strength")
    if strength == 0:
        return denoise

    def guided(x: Tensor, level: NoiseLevel) -> Estimate:
        estimate = denoise(x, level)
        if level.alpha == 0:
            return estimate
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_probability(leaf, level).sum(), leaf)
        change = strength * level.sigma**2 / level.alpha * gradient
        return estimate.with_x0(estimate.x0 + change)

    return guided


@dataclass(frozen=True, slots=True)
class ClassifierGuide:
    """Classifier guidance: Dhariwal & Nichol 2021; see `from_classifier`.

    Attributes:
        classifier: a classifier of the model's noised latents, on its device.
        label: one label for all pictures, or one for each.
        scale: strength; 0 is off, 1 the classifier's own say.
    """

    classifier: Classifier
    label: str | Sequence[str]
    scale: float = 1.0

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """The guide with a label for each picture.

        Raises:
            UserError: no such label, or another number of labels than of pictures.
        """
        count = len(context.prompts)
        labels = [self.label] * count if isinstance(self.label, str) else list(self.label)
        if len(labels) != count:
            raise UserError(f"{len(labels)} labels were given for {count} pictures.")
        self.classifier.places(labels)
        return replace(self, label=labels), unchanged

    def denoiser(self, denoise: Denoiser) -> Denoiser:
        """See `EditsDenoiser`."""
        labels = [self.label] if isinstance(self.label, str) else self.label
        places = self.classifier.places(labels)
        return from_classifier(
            denoise,
            lambda x, level: self.classifier.log_probability(x, level, places),
            strength=self.scale,
        )

"""Guidance by the gradient of another model: a classifier of noised latents, or CLIP."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.guidance.classifier import Classifier
from latentdiff.guidance.clip import Clip
from latentdiff.guidance.further import from_classifier
from latentdiff.guidance.gradient import from_estimate


@dataclass(frozen=True, slots=True)
class Scene:
    """What the pipeline tells a guide about a run.

    Attributes:
        prompts: of each of the B pictures.
        decode: latents [B, C, h, w] -> pictures [B, 3, H, W] about [-1, 1], with gradients.
    """

    prompts: list[str]
    decode: Callable[[Tensor], Tensor]


@runtime_checkable
class SteersEstimate(Protocol):
    """A guide around the guided denoiser."""

    def denoiser(self, denoise: Denoiser, scene: Scene) -> Denoiser: ...


def steer(denoise: Denoiser, guides: Sequence[object], scene: Scene) -> Denoiser:
    """The denoiser with those of the guides around it that steer its estimate, in their order."""
    for guide in guides:
        if isinstance(guide, SteersEstimate):
            denoise = guide.denoiser(denoise, scene)
    return denoise


@dataclass(frozen=True, slots=True)
class ClassifierGuide:
    """Classifier guidance: Dhariwal & Nichol 2021; see `guidance.from_classifier`.

    Attributes:
        classifier: of noised latents of the model that draws; on its device.
        label: of all pictures, or one for each.
        scale: strength; 0 is off, 1 the classifier's own say.
    """

    classifier: Classifier
    label: str | Sequence[str]
    scale: float = 1.0

    def denoiser(self, denoise: Denoiser, scene: Scene) -> Denoiser:
        """The guided denoiser.

        Raises:
            UserError: no such label, or another number of labels than of pictures.
        """
        count = len(scene.prompts)
        labels = [self.label] * count if isinstance(self.label, str) else list(self.label)
        if len(labels) != count:
            raise UserError(f"{len(labels)} labels were given for {count} pictures.")
        places = self.classifier.places(labels)
        return from_classifier(
            denoise,
            lambda x, level: self.classifier.log_probability(x, level, places),
            strength=self.scale,
        )


@dataclass(frozen=True, slots=True)
class ClipGuide:
    """CLIP guidance: the score of a text and the decoded x_0; see `guidance.from_estimate`.

    The score is CLIP's own logit, cosine times temperature, so scale 1 is CLIP's own say. Its
    gradient goes through the autoencoder's decoder, and by option through the network.

    Attributes:
        clip: on the device of the model that draws.
        scale: strength; 0 is off.
        text: what the pictures shall show; None for their prompts.
        through: whether the gradient goes through the network, too: about twice the cost.
        interval: of sigma / alpha, above the first and up to the second.
    """

    clip: Clip
    scale: float = 1.0
    text: str | None = None
    through: bool = False
    interval: tuple[float, float] = (0.0, math.inf)

    def denoiser(self, denoise: Denoiser, scene: Scene) -> Denoiser:
        """The guided denoiser."""
        texts = self.clip.texts(scene.prompts if self.text is None else [self.text])
        temperature = self.clip.temperature

        def score(x0: Tensor) -> Tensor:
            return temperature * self.clip.score(scene.decode(x0), texts).to(x0.device)

        return from_estimate(
            denoise,
            score,
            strength=self.scale,
            through=self.through,
            interval=self.interval,
        )

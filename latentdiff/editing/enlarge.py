"""Enlargement: a model that sees a small picture draws it larger (a cascade's second stage)."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from latentdiff.editing.lowpass import agreeing, enlarged
from latentdiff.editing.run_context import Finish, RunContext, opened, pixels, size_of
from latentdiff.errors import UserError
from latentdiff.models.network import LowResolution
from latentdiff.pictures import Picture


@dataclass(frozen=True, eq=False)
class Enlarge:
    """Image condition of upscaling models (C + 3 input channels): a small picture, with noise.

    Saharia et al. 2021 (SR3), section 2: the network sees x_t beside the small picture y. Ho et al.
    2022 (CDM), section 4.2, and Saharia et al. 2022 (Imagen), section 2.3: in training noise is
    added to y, and the network is told how much, so that it also enlarges what another model drew;
    in a run the level is free. The run is as many times larger than y as the model was trained for.

    Args:
        image: y, opened here; or in [-1, 1], [1 or B, 3, h, w].
        noise_level: s of y_s = alpha_s y + sigma_s eps, 0 up to the model's highest. 0 trusts every
            pixel, more lets the model mend y; diffusers' pipeline takes 20.
        hold: whether the finished picture, made smaller, is y again (`lowpass.agreeing`); not for a
            picture that needs mending.
        shown: [B, 3, h, w], what the network sees; the pipeline puts it there.

    Raises:
        UserError: no picture, or no level.
    """

    image: Picture | Tensor
    noise_level: int = 0
    hold: bool = True
    shown: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.noise_level, bool) or not isinstance(self.noise_level, int):
            raise UserError(f"noise_level must be a whole number, not {self.noise_level!r:.40}.")
        if self.noise_level < 0:
            raise UserError(f"noise_level must be at least 0, not {self.noise_level}.")
        object.__setattr__(self, "image", opened(self.image))

    @property
    def image_guidance_scale(self) -> float:
        """Off."""
        return 1.0

    def run_size(self, low: LowResolution) -> tuple[int, int]:
        """Height and width of what the model makes of the picture."""
        image = self.image
        sides = image.shape[-2:] if isinstance(image, Tensor) else size_of(image)
        assert sides is not None
        return sides[0] * low.ratio, sides[1] * low.ratio

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """See `Binds`."""
        low, noise = context.low_resolution, context.noise
        if low is None or noise is None:
            raise UserError(
                "this model enlarges no pictures: Enlarge needs an upscaling model, as "
                "`latentdiff train diffusion` makes one with data.low_resolution."
            )
        if self.noise_level > low.max_noise_level:
            raise UserError(
                f"noise_level: this model was trained up to {low.max_noise_level}, not "
                f"{self.noise_level}."
            )
        small = pixels(self.image) if isinstance(self.image, Image.Image) else self.image
        assert isinstance(small, Tensor)
        eps = noise.draw(small.shape[1:])
        levels = torch.full((len(eps),), self.noise_level)
        shown = noised(low, small, eps, levels)
        height, width = (side // context.autoencoder.factor for side in context.padded)
        bound = replace(self, shown=as_large_as(shown, (height, width)))

        def finish(large: Tensor) -> Tensor:
            if low.residual:
                large = large + enlarged(small.to(large), self.run_size(low))
            return agreeing(large, small.to(large)) if self.hold else large

        return bound, finish

    def beside(self, x: Tensor) -> Tensor:
        """The small picture, with its noise [B, 3, h, w].

        Raises:
            UserError: the edit is not bound to a run of this size.
        """
        if self.shown is None or self.shown.shape[-2:] != x.shape[-2:]:
            raise UserError("Enlarge holds a picture: hand it to the pipeline.")
        return self.shown.to(x).expand(len(x), -1, -1, -1)

    def noise_levels(self, x: Tensor) -> Tensor:
        """The level of each row of x [B, C, h, w]: int64 [B]."""
        return torch.full((len(x),), self.noise_level, device=x.device)


def noised(low: LowResolution, small: Tensor, eps: Tensor, levels: Tensor) -> Tensor:
    """y_s = alpha_s y + sigma_s eps (Ho et al. 2022, CDM, section 4.2).

    Args:
        low: whose process.
        small: y [1 or B, 3, h, w] in [-1, 1].
        eps: standard normal [B, 3, h, w].
        levels: s, int64 [B].
    """
    alpha, sigma = (part.view(-1, 1, 1, 1) for part in low.process.alpha_sigma(levels.double()))
    return alpha.to(small) * small + sigma.to(small) * eps.to(small)


def as_large_as(small: Tensor, size: tuple[int, int]) -> Tensor:
    """A small picture [B, 3, h, w] at the size of the latents, as SR3 does it: by a cubic."""
    if small.shape[-2:] == size:
        return small
    return interpolate(small, size=size, mode="bicubic", align_corners=False)

"""Image conditions concatenated to x_t: a masked picture (`Inpaint`) or a source (`Instruct`)."""

from dataclasses import dataclass, replace
from typing import Self

from PIL import Image
from torch import Tensor

from latentdiff.editing.masks import inpainting_channels, mask_tensor, masked_picture, paste
from latentdiff.editing.repaint import Hole
from latentdiff.editing.run_context import (
    Finish,
    RunContext,
    latents_like,
    opened,
    pixels,
    size_of,
    unchanged,
)
from latentdiff.errors import check_finite
from latentdiff.pictures import Picture


@dataclass(frozen=True, eq=False)
class Inpaint(Hole):
    """Image condition of inpainting models (2C + 1 input channels): mask and masked picture.

    Rombach et al. 2022 (LDM), section 4.5, as in Stable Diffusion's inpainting checkpoints. In the
    end the known pixels are the picture's own, bit for bit, and the seam lies in the hole. With
    `SDEdit` the run starts from the picture; with `RePaint` the known region is held as well.

    Args:
        image: see `Hole`. Latents are those of `latentdiff.editing.masks.masked_picture`.
        mask: see `Hole`. For the U-Net 0.5 and more is hole.

    Raises:
        UserError: see `Hole`.
    """

    @property
    def image_guidance_scale(self) -> float:
        """Off."""
        return 1.0

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """See `HoldsPicture`."""
        if isinstance(self.image, Tensor):
            return self, unchanged
        picture, mask = pixels(self.image), mask_tensor(self.mask)
        masked = context.latents(masked_picture(picture, mask))
        bound = replace(self, image=masked, mask=context.pad(mask))
        return bound, lambda painted: paste(painted, picture, mask, context.autoencoder.factor)

    def beside(self, x: Tensor) -> Tensor:
        """The mask and the masked picture [B, 1 + C, h, w]; see `inpainting_channels`."""
        assert isinstance(self.mask, Tensor)
        masked = latents_like(self.image, x)
        return inpainting_channels(self.mask.to(x), masked.expand(len(x), -1, -1, -1))


@dataclass(frozen=True, eq=False)
class Instruct:
    """Image condition of InstructPix2Pix models (2C input channels): the picture to change.

    Brooks et al. 2023 (InstructPix2Pix), section 3.2: the U-Net sees the picture, and guidance has
    a second scale for it, eq. 3 (`latentdiff.guidance.cfg`).

    Args:
        image: the picture, opened here; or what the autoencoder gives for it [1 or B, C, h, w],
            not scaled: these models are trained so.
        image_guidance_scale: how closely to keep to the picture; 1 is off.

    Raises:
        UserError: no picture, or a scale that is not finite.
    """

    image: Picture | Tensor
    image_guidance_scale: float = 1.5

    def __post_init__(self) -> None:
        check_finite(self.image_guidance_scale, "image_guidance_scale")
        object.__setattr__(self, "image", opened(self.image))

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """See `HoldsPicture`."""
        return size_of(self.image)

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """See `HoldsPicture`."""
        if not isinstance(self.image, Image.Image):
            return self, unchanged
        latents = context.latents(pixels(self.image))
        scale = context.autoencoder.scaling_factor
        assert scale is not None  # as every model with such an input has it
        return replace(self, image=latents / scale), unchanged

    def beside(self, x: Tensor) -> Tensor:
        """The picture [B, C, h, w]."""
        return latents_like(self.image, x).expand_as(x)

"""Image prompts of a call: pictures that the model draws after, by an IP-Adapter."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.diffusion.condition import ImageTokens
from latentdiff.errors import UserError, check_finite
from latentdiff.formats.ip_adapter import load_ip_adapter
from latentdiff.models.image_prompts import ImageAdapter, check_adapter
from latentdiff.pictures import Picture, open_picture


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """A picture that is to be drawn after, and the IP-Adapter that shows it to the model.

    Ye et al. 2023 (IP-Adapter). Several add up, each with its own scale. What its adapter sees is
    kept: one that is given to many calls is looked at once on each device.

    Args:
        adapter: a .safetensors file with its `image_encoder` folder beside it, or the folder of
            both, read here in float32; or what `load_ip_adapter` read, once for many calls and on
            the model's own device.
        image: a picture, or a list of them that are seen together. Of each the middle square is
            seen, at the size of the image encoder.
        scale: strength; 0 is off, and 1 as strong as the text.
        encoder: folder of the image encoder, where it is none beside the file.

    Raises:
        UserError: no IP-Adapter, no picture, or a scale that is no number.
    """

    adapter: str | Path | ImageAdapter
    image: Picture | Sequence[Picture]
    scale: float = 1.0
    encoder: str | Path | None = None
    _kept: dict[Any, tuple[ImageAdapter, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        check_finite(self.scale, "image prompt: scale")
        given: Any = self.image if isinstance(self.image, list | tuple) else [self.image]
        if not given:
            raise UserError("image prompt: its list of pictures is empty.")
        object.__setattr__(self, "image", [open_picture(one) for one in given])
        if isinstance(self.adapter, ImageAdapter):
            if self.encoder is not None:
                raise UserError("image prompt: a loaded adapter has its encoder; leave it out.")
        else:
            loaded = load_ip_adapter(self.adapter, encoder=self.encoder)
            object.__setattr__(self, "adapter", loaded)

    @property
    def pictures(self) -> list[Image.Image]:
        """The pictures, opened."""
        pictures: Any = self.image
        return pictures

    @property
    def loaded(self) -> ImageAdapter:
        """The adapter."""
        assert isinstance(self.adapter, ImageAdapter)
        return self.adapter

    def tokens(
        self, device: torch.device, dtype: torch.dtype, *, blank: bool = False
    ) -> tuple[ImageAdapter, Tensor]:
        """The adapter there, and its tokens [1, S, D]: of the pictures, or where `blank`, of as
        many of nothing."""
        kept = self._kept.get((device, dtype, blank))
        if kept is None:
            if blank:
                adapter = self.tokens(device, dtype)[0]
                kept = adapter, adapter.blank_tokens(len(self.pictures))
            else:
                adapter = self.loaded.on(device, dtype)
                kept = adapter, adapter.tokens(self.pictures)
            self._kept[device, dtype, blank] = kept
        return kept


Shown = tuple[ImageTokens, ...]


def check_image_prompts(prompts: Sequence[object]) -> None:
    """Check that a list holds image prompts.

    Raises:
        UserError: it holds something else.
    """
    for prompt in prompts:
        if not isinstance(prompt, ImagePrompt):
            raise UserError(
                f"image_prompts: give ImagePrompt(adapter, picture), not {prompt!r:.60}."
            )


def shown(
    prompts: Sequence[ImagePrompt], bundle: Bundle, pictures: int, *, guided: bool
) -> tuple[Shown, Shown]:
    """The image prompts as the network is told them, and what it is led away from.

    Args:
        prompts: of the call; those of scale 0 are left out.
        bundle: the model.
        pictures: number of the pictures that are drawn.
        guided: whether anything is led away from; if not, the second is empty.

    Raises:
        UserError: an adapter is of another model.
    """
    toward: list[ImageTokens] = []
    away: list[ImageTokens] = []
    for prompt in prompts:
        check_adapter(prompt.loaded, bundle.network)
        if prompt.scale == 0:
            continue
        adapter, seen = prompt.tokens(bundle.device, bundle.network.dtype)
        each, scale = (pictures, -1, -1), float(prompt.scale)
        toward.append(ImageTokens(adapter, seen.expand(each), scale))
        if guided:
            _, blank = prompt.tokens(bundle.device, bundle.network.dtype, blank=True)
            away.append(ImageTokens(adapter, blank.expand(each), scale))
    return tuple(toward), tuple(away)

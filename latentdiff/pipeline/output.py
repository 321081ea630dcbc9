"""The pictures of a call, as the caller wants them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from latentdiff.pictures import encode_png, fit, grid, to_pil

OutputType = Literal["pil", "pt", "np", "latent"]


_COLUMNS, _SIDE = 8, 256  # of several pictures in a notebook; pixels


@dataclass(frozen=True, slots=True, repr=False)
class PipelineOutput:
    """The result of a call of the pipeline; in a notebook, its pictures.

    As diffusers' output it is also the pair (images, None): no filter has looked at them.

    Attributes:
        images: with output_type "pil" a list of RGB pictures; "pt" a tensor [B, 3, H, W] in
            [0, 1]; "np" an array [B, H, W, 3] in [0, 1]; "latent" the latents.
        seeds: the seed of each picture.
        indices: index of each picture within its seed; `pipe(prompt, seed=s, first=i)` with a
            picture's own seed and index draws it again.
        latents: [B, C, h, w] float32, as the run left them.
        nfe: number of calls of the network.
        cut: for each prompt, the part that did not fit the token window; mostly "".
        variation_seeds: of each picture, the seed that its noise was turned towards; empty without
            `variation_strength`.
    """

    images: Any
    seeds: list[int]
    indices: list[int]
    latents: Tensor
    nfe: int
    cut: list[str]
    variation_seeds: list[int] = field(default_factory=list)

    def __repr__(self) -> str:
        count = len(self.seeds)
        seeds = self.seeds[0] if len({*self.seeds}) == 1 else self.seeds
        many = "1 picture" if count == 1 else f"{count} pictures"
        return f"PipelineOutput({many}, seed {seeds!s:.60}, {self.nfe} calls of the network)"

    def __getitem__(self, index: int) -> Any:
        return (self.images, None)[index]

    def _repr_png_(self) -> bytes | None:
        """The pictures for a notebook; None of latents."""
        if self.images is self.latents:
            return None
        shown: Sequence[Image.Image] = self.images
        if not isinstance(self.images, list):
            array = torch.as_tensor(self.images).cpu()
            tensor = array if isinstance(self.images, Tensor) else array.permute(0, 3, 1, 2)
            shown = [to_pil(picture * 2 - 1) for picture in tensor]
        if len(shown) == 1:
            return encode_png(shown[0])
        return encode_png(grid([fit(image, _SIDE) for image in shown], _COLUMNS))


def converted(pictures: Tensor, output_type: OutputType) -> object:
    """Pictures [B, 3, H, W] about [-1, 1], as `PipelineOutput.images` has them."""
    if output_type == "pil":
        return [to_pil(picture) for picture in pictures.cpu()]
    unit = (pictures / 2 + 0.5).clamp(0, 1)
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()

"""The pictures of a call, as the caller wants them."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from latentdiff.pictures import to_pil

OutputType = Literal["pil", "pt", "np", "latent"]


@dataclass(frozen=True, slots=True)
class PipelineOutput:
    """The result of a call of the pipeline.

    Attributes:
        images: with output_type "pil" a list of RGB pictures; "pt" a tensor [B, 3, H, W] in
            [0, 1]; "np" an array [B, H, W, 3] in [0, 1]; "latent" the latents.
        seeds: the seed of each picture.
        indices: index of each picture within its seed; `pipe(prompt, seed=s, first=i)` with a
            picture's own seed and index draws it again.
        latents: [B, C, h, w] float32, as the run left them.
        nfe: number of calls of the network.
        cut: for each prompt, the part that did not fit the token window; mostly "".
    """

    images: Any
    seeds: list[int]
    indices: list[int]
    latents: Tensor
    nfe: int
    cut: list[str]


def converted(pictures: Tensor, output_type: OutputType) -> object:
    """Pictures [B, 3, H, W] about [-1, 1], as `PipelineOutput.images` has them."""
    if output_type == "pil":
        return [to_pil(picture) for picture in pictures.cpu()]
    unit = (pictures / 2 + 0.5).clamp(0, 1)
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()

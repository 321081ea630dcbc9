"""Self-attention of a U-Net, spoilt in some rows of a batch, without touching the U-Net itself."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from latentdiff.errors import UserError

Module = TypeVar("Module", bound=nn.Module)

MID = ("mid_block",)


class Perturbation(Protocol):
    """A perturbation of some self-attention layers, as PAG and SEG use."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Prefixes of the names of the layers: "mid_block", which is the middle block of a
        transformer too, or "up_blocks.1.attentions.0"."""
        ...

    def mix(self, attention: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Replace softmax(q k) v: [B, h w, D] on a grid of that size -> [B, h w, D].

        `attention` is the layer, one of ours or of diffusers.
        """
        ...


@dataclass(frozen=True, slots=True)
class IdentityAttention:
    """Identity attention, each place attending only to itself: Ahn et al. 2024 (PAG), eq. 10."""

    layers: tuple[str, ...] = MID

    def mix(self, attention: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        return attention.to_v(x)


@dataclass(frozen=True, slots=True)
class BlurredQueries:
    """Queries blurred over the grid: Hong 2024 (SEG), sec. 4.2, whose code this follows.

    Attributes:
        sigma: standard deviation of the Gaussian, in pixels of the layer's grid; infinite for the
            mean query.
    """

    sigma: float = math.inf
    layers: tuple[str, ...] = MID

    def mix(self, attention: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        batch, places, _ = x.shape
        query, key, value = (
            project(x).view(batch, places, attention.heads, -1).transpose(1, 2)
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        rows, columns = (blur_matrix(side, self.sigma).to(query) for side in size)
        query = query.unflatten(2, size)
        query = torch.einsum("yi,xj,bnijd->bnyxd", rows, columns, query).flatten(2, 3)
        mixed = scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).reshape(batch, places, -1)


def blur_matrix(side: int, sigma: float) -> Tensor:
    """A Gaussian blur of a line as a matrix [side, side], float64.

    The kernel spans 6 sigma, but no more than the line; beyond its ends the line is reflected.
    """
    if math.isinf(sigma):
        return torch.full((side, side), 1 / side, dtype=torch.float64)
    width = math.ceil(6 * sigma)
    half = min(width // 2, side // 2)
    offsets = torch.arange(-half, half + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    matrix = torch.zeros(side, side, dtype=torch.float64)
    for offset, weight in zip(range(-half, half + 1), kernel, strict=True):
        for place in range(side):
            reflected = abs(place + offset)
            matrix[place, min(reflected, 2 * (side - 1) - reflected)] += weight
    return matrix


def perturbable(unet: Module, perturbations: Sequence[Perturbation]) -> Module:
    """A U-Net of the same tensors whose self-attention can be spoilt; the given one stays as it is.

    Only the modules are copied (tens of milliseconds), and so threads may share the given one.

    Returns:
        A U-Net that takes cross_attention_kwargs={"spoilt": Spoilt(...)}, where perturbation k of
        the list has the number k + 1; without them it does what the given one does.

    Raises:
        UserError: a perturbation names no self-attention layer.
    """
    shared: dict[int, Any] = {id(t): t for t in (*unet.parameters(), *unet.buffers())}
    twin = copy.deepcopy(unet, shared)
    layers: dict[str, Any] = {n: m for n, m in twin.named_modules() if hasattr(m, "processor")}
    selves = [n for n in layers if n.endswith(".attn1") and not layers[n].is_cross_attention]
    chosen = [tuple(_middle(layer, selves) for layer in each.layers) for each in perturbations]
    for wanted in (layer for each in chosen for layer in each):
        if not any(name.startswith(wanted) for name in selves):
            known = ", ".join(sorted({name.split(".transformer_blocks")[0] for name in selves}))
            raise UserError(f"no self-attention layer is called '{wanted}'; there are: {known}.")
    for name, layer in layers.items():
        own = {
            number: perturbation
            for number, (perturbation, wanted) in enumerate(
                zip(perturbations, chosen, strict=True), 1
            )
            if name in selves and name.startswith(wanted)
        }
        layer.processor = _Spoiling(layer.processor, own)
    return twin


def _middle(layer: str, selves: Sequence[str]) -> str:
    """The prefix of a layer's name, where "mid_block" is the middle block of a transformer, too."""
    blocks = [name for name in selves if name.startswith("transformer_blocks.")]
    if layer not in MID or not blocks:
        return layer
    return blocks[len(blocks) // 2]


@dataclass(frozen=True, slots=True)
class Spoilt:
    """The rows of a batch whose attention is perturbed.

    Attributes:
        rows: int64 [B]: the number of a perturbation, or 0.
        size: height and width of the latents.
    """

    rows: Tensor
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Spoiling:
    """An attention processor around another."""

    inner: Any
    perturbations: Mapping[int, Perturbation]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        spoilt: Spoilt | None = None,
        **shown: Any,
    ) -> Tensor:
        out = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, **shown)
        if spoilt is None or not self.perturbations:
            return out
        size = _grid(spoilt.size, hidden_states.shape[1])
        for number, perturbation in self.perturbations.items():
            mixed = attn.to_out[1](attn.to_out[0](perturbation.mix(attn, hidden_states, size)))
            out = torch.where((spoilt.rows == number)[:, None, None], mixed, out)
        return out


def _grid(size: tuple[int, int], places: int) -> tuple[int, int]:
    """The grid of a layer: the latents' own, halved as often as there are too many places."""
    while size[0] * size[1] > places:
        size = -(-size[0] // 2), -(-size[1] // 2)
    return size

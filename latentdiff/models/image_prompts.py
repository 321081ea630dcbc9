"""Image adapters: Ye et al. 2023 (IP-Adapter: Text Compatible Image Prompt Adapter).

An image encoder sees a picture, a projection makes tokens of it, and each cross-attention layer of
the network attends to them with keys and values of their own, beside the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from latentdiff.errors import UserError
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.models.extension import Extension
from latentdiff.pictures import to_tensor

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

    from latentdiff.models.network import Network

Projecting = Literal["pooled", "full", "plus"]
"""The published kinds of projection: of CLIP's pooled vector, of all its states ("full face"), or
of them through a resampler ("plus")."""

_HEAD = 64  # width of a resampler's head
# Of OpenAI's CLIP, as diffusers normalises pictures for every IP-Adapter.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_LONGEST = 8  # times the shorter side; of a longer picture the middle alone is resized


@dataclass(frozen=True, slots=True)
class AdapterSizes:
    """What the shapes in a file tell of an image adapter.

    Attributes:
        kind: of its projection.
        inside: D of what the image encoder gives.
        outside: D of the text states that its tokens stand beside.
        tokens: number of tokens of a picture, where the projection says it: all but "full".
        layers: W of each cross-attention layer.
        hidden: D inside a resampler, of "plus".
        heads: its attention's, likewise.
        depth: its layers, likewise.
        inner: D of its feed-forward layers, likewise.
    """

    kind: Projecting
    inside: int
    outside: int
    tokens: int
    layers: Sequence[int]
    hidden: int = 0
    heads: int = 0
    depth: int = 0
    inner: int = 0


class IPAdapter(nn.Module):
    """The projection of pictures and the further keys and values, by the names of the files.

    Args:
        sizes: of its layers.
    """

    def __init__(self, sizes: AdapterSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.image_proj = _PROJECTIONS[sizes.kind](sizes)
        self.ip_adapter = nn.ModuleDict(
            {str(2 * n + 1): KeysAndValues(sizes.outside, w) for n, w in enumerate(sizes.layers)}
        )


class KeysAndValues(nn.Module):
    """Keys and values of tokens [B, S, D] for one cross-attention layer."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(inside, width, bias=False)
        self.to_v_ip = nn.Linear(inside, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


class PooledProjection(nn.Module):
    """A few tokens out of one vector: [B, P] -> [B, S, D]."""

    def __init__(self, sizes: AdapterSizes) -> None:
        super().__init__()
        self.tokens = sizes.tokens
        self.proj = nn.Linear(sizes.inside, sizes.tokens * sizes.outside)
        self.norm = nn.LayerNorm(sizes.outside)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.norm(self.proj(vectors).unflatten(1, (self.tokens, -1)))


class FullProjection(nn.Module):
    """A token of each state of the encoder: [B, S, E] -> [B, S, D]."""

    def __init__(self, sizes: AdapterSizes) -> None:
        super().__init__()
        inside, outside = sizes.inside, sizes.outside
        first, last = nn.Linear(inside, inside), nn.Linear(inside, outside)
        self.proj = nn.Sequential(first, nn.GELU(), last, nn.LayerNorm(outside))

    def forward(self, states: Tensor) -> Tensor:
        return self.proj(states)


class Resampler(nn.Module):
    """Learned tokens that attend to the states of the encoder: [B, S, E] -> [B, tokens, D].

    The Perceiver resampler of Alayrac et al. 2022 (Flamingo), without positions.
    """

    def __init__(self, sizes: AdapterSizes) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, sizes.tokens, sizes.hidden))
        self.proj_in = nn.Linear(sizes.inside, sizes.hidden)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    ResamplerAttention(sizes.hidden, sizes.heads),
                    ResamplerFeedForward(sizes.hidden, sizes.inner),
                ]
            )
            for _ in range(sizes.depth)
        )
        self.proj_out = nn.Linear(sizes.hidden, sizes.outside)
        self.norm_out = nn.LayerNorm(sizes.outside)

    def forward(self, states: Tensor) -> Tensor:
        x, tokens = self.proj_in(states), self.latents.expand(len(states), -1, -1)
        layer: Any
        for layer in self.layers:
            attend, think = layer
            tokens = attend(x, tokens) + tokens
            tokens = think(tokens) + tokens
        return self.norm_out(self.proj_out(tokens))


class ResamplerAttention(nn.Module):
    """Tokens [B, S, D] attend to states [B, L, D] and to themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, _HEAD * heads, bias=False)
        self.to_kv = nn.Linear(width, 2 * _HEAD * heads, bias=False)
        self.to_out = nn.Linear(_HEAD * heads, width, bias=False)

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        states, tokens = self.norm1(states), self.norm2(tokens)
        seen = self.to_kv(torch.cat([states, tokens], dim=1)).chunk(2, dim=-1)
        q, k, v = (
            part.unflatten(2, (self.heads, _HEAD)).transpose(1, 2)
            for part in (self.to_q(tokens), *seen)
        )
        return self.to_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ResamplerFeedForward(nn.Sequential):
    """The feed-forward part of a layer of a resampler."""

    def __init__(self, width: int, inner: int) -> None:
        first, last = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        super().__init__(nn.LayerNorm(width), first, nn.GELU(), last)


_PROJECTIONS = {"pooled": PooledProjection, "full": FullProjection, "plus": Resampler}


@dataclass(frozen=True, eq=False)
class ImageAdapter(Extension):
    """An IP-Adapter with the image encoder that it was trained with; threads may share it.

    Attributes:
        module: its weights.
        encoder: sees the pictures.
        name: for people.
    """

    module: IPAdapter
    encoder: "CLIPVisionModelWithProjection"
    name: str = "ip-adapter"

    @torch.no_grad()
    def tokens(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Tokens of RGB pictures that are seen together, in their order: [1, S, D]."""
        pixels = torch.stack([_pixels(picture, self._side) for picture in pictures])
        return self._projected(self._seen(pixels.to(self.device, self.dtype)))

    @torch.no_grad()
    def blank_tokens(self, count: int) -> Tensor:
        """Tokens [1, S, D] of as many pictures of nothing, for what guidance leads away from.

        Nothing is the zero vector, or where all states of the encoder are read, what it sees in
        the mean colour; so diffusers has it.
        """
        sizes = self.module.sizes
        shape = (sizes.inside,) if sizes.kind == "pooled" else (3, self._side, self._side)
        zeros = torch.zeros(count, *shape, device=self.device, dtype=self.dtype)
        return self._projected(zeros if sizes.kind == "pooled" else self._seen(zeros))

    def keys_and_values(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `latentdiff.diffusion.condition.ReadsTokens`."""
        return self.module.ip_adapter[str(2 * layer + 1)](tokens)

    @property
    def _side(self) -> int:
        side: Any = self.encoder.config.image_size
        return side

    def _seen(self, pixels: Tensor) -> Tensor:
        """What the projection reads of pictures [N, 3, side, side]: vectors, or states."""
        if self.module.sizes.kind == "pooled":
            return self.encoder(pixels).image_embeds
        return self.encoder(pixels, output_hidden_states=True).hidden_states[-2]

    def _projected(self, seen: Tensor) -> Tensor:
        return self.module.image_proj(seen).flatten(0, 1)[None]


def _pixels(picture: Image.Image, side: int) -> Tensor:
    """A picture as CLIP sees it [3, side, side], resized and cropped as its processor does."""
    shorter = min(picture.size)
    picture = _middle(picture, *(min(length, _LONGEST * shorter) for length in picture.size))
    wide, high = (side * length // shorter for length in picture.size)
    square = _middle(picture.resize((wide, high), Image.Resampling.BICUBIC), side, side)
    mean, std = (torch.tensor(each)[:, None, None] for each in (_MEAN, _STD))
    return (to_tensor(square) / 2 + 0.5 - mean) / std


def _middle(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def check_adapter(adapter: ImageAdapter, network: "Network") -> None:
    """Check that an image adapter fits a model.

    Args:
        adapter: the adapter.
        network: of the model.

    Raises:
        UserError: it does not, or the model's U-Net is none of our own.
    """
    unet, sizes = network.module, adapter.module.sizes
    if not isinstance(unet, CrossAttentionUNet):
        raise UserError(
            f"image_prompts: this model's network is a {type(unet).__name__}, which is shown no "
            "pictures here."
        )
    layers = [layer.width for layer in unet.cross_attention()]
    for what, own, wanted in (
        ("text states of width {}", sizes.outside, network.width),
        ("{} cross-attention layers", len(sizes.layers), len(layers)),
        ("cross-attention layers of widths {}", list(sizes.layers), layers),
    ):
        if own != wanted:
            raise UserError(
                f"image_prompts: {adapter.name} is for {what.format(own)}, the model has "
                f"{what.format(wanted)}: it belongs to another model."
            )

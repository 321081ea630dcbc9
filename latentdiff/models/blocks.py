"""The blocks of U-Nets and autoencoders, with the tensor names that diffusers gives them.

They compute what diffusers' blocks compute, operation by operation, so that float32 outputs are
equal to the last bit; what no checkpoint of the family uses is left out.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, pad, silu

from latentdiff.models.attention import AttentionLayer


class SpatialAttention(AttentionLayer):
    """Self-attention between the places of a feature map [B, C, H, W], in one head: of the VAE."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__(width, 1, bias=True)
        self.upcast = True
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        places = self.group_norm(x.flatten(2)).transpose(1, 2)
        mixed = super().forward(places).transpose(1, 2)
        return mixed.reshape(x.shape) + x


class GEGLU(nn.Module):
    """A gated linear unit: Shazeer 2020."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * gelu(gate)


class FeedForward(nn.Module):
    """The feed-forward part of a transformer block, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 4 * width
        self.net = nn.ModuleList([GEGLU(width, inner), nn.Dropout(0.0), nn.Linear(inner, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each around a residual: [B, L, D].

    Attributes:
        checkpointing: see `run`.
    """

    checkpointing = False

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = AttentionLayer(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = AttentionLayer(width, heads, context=context)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(
        self, x: Tensor, states: Any, mask: Tensor | None, spoilt: Any, images: Any
    ) -> Tensor:
        x = self.attn1(self.norm1(x), spoilt=spoilt) + x
        x = self.attn2(self.norm2(x), states, mask, spoilt, images) + x
        return self.ff(self.norm3(x)) + x


class Transformer(nn.Module):
    """Transformer blocks over the places of a feature map [B, C, H, W]."""

    def __init__(
        self, width: int, heads: int, depth: int, context: int, groups: int, *, linear: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(width, heads, context) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(
        self, x: Tensor, states: Any, mask: Tensor | None, spoilt: Any, images: Any
    ) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = h.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        if self.linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = run(block, h, states, mask, spoilt, images)
        if self.linear:
            h = self.proj_out(h)
        h = h.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        # In the memory layout of x, whichever it is.
        h = h.contiguous(memory_format=_layout(x))
        return (h if self.linear else self.proj_out(h)) + x


class ResnetBlock2D(nn.Module):
    """Two convolutions with a residual connection; a time embedding is added between them.

    Attributes:
        checkpointing: see `run`.
    """

    checkpointing = False

    def __init__(
        self, inside: int, outside: int, groups: int, eps: float, time: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inside, eps=eps)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        if time is not None:
            self.time_emb_proj = nn.Linear(time, outside)
        self.norm2 = nn.GroupNorm(groups, outside, eps=eps)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Downsample(nn.Module):
    """A convolution of stride 2."""

    def __init__(self, width: int, *, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = x.shape[-2:]
        return self.conv(interpolate(x, size=size or (2 * height, 2 * width), mode="nearest"))


def sinusoids(t: Tensor, width: int, *, flip: bool = True, shift: float = 0) -> Tensor:
    """Sines and cosines of numbers [N], float32 [N, width]: Vaswani et al. 2017, sec. 3.5.

    Args:
        flip: whether cosines come first.
        shift: subtracted from the count of frequencies.
    """
    half = width // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = torch.exp(exponent / (half - shift)) * t[:, None].float()
    sine, cosine = torch.sin(angles), torch.cos(angles)
    first, second = (cosine, sine) if flip else (sine, cosine)
    return pad(torch.cat([first, second], -1), (0, width % 2))


class TimeEmbedding(nn.Module):
    """Embeds times, or pooled text and sizes, by two linear layers.

    Args:
        inside: D of the numbers.
        outside: D of what the blocks are told.
        beside: D of what is added to the numbers first; None for nothing.
    """

    def __init__(self, inside: int, outside: int, beside: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inside, outside)
        self.cond_proj = None if beside is None else nn.Linear(beside, inside, bias=False)
        self.linear_2 = nn.Linear(outside, outside)

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        if beside is not None and self.cond_proj is not None:
            x = x + self.cond_proj(beside)
        return self.linear_2(silu(self.linear_1(x)))


def run(block: nn.Module, *given: Any) -> Tensor:
    """Call a block; where it is `checkpointing`, the backward pass computes its inside anew."""
    if block.checkpointing and torch.is_grad_enabled():
        from torch.utils.checkpoint import checkpoint

        answer: Any = checkpoint(block, *given, use_reentrant=False)
        return answer
    return block(*given)


def _layout(x: Tensor) -> torch.memory_format:
    last = torch.channels_last
    plain = x.is_contiguous() or not x.is_contiguous(memory_format=last)
    return torch.contiguous_format if plain else last

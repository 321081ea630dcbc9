"""The transformer of PixArt, with the tensor names of diffusers' PixArtTransformer2DModel.

It computes what diffusers' class computes, operation by operation, so that float32 outputs are
equal to the last bit.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from latentdiff.models.attention import AttentionLayer
from latentdiff.models.blocks import TimeEmbedding, run, sinusoids

_WAVES = 256  # of the time, and of each number
_CHOICES: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 128,
    "patch_size": 2,
    "upcast_attention": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "caption_channels": None,
    # Without effect on what it computes.
    "norm_num_groups": 32,
    "num_embeds_ada_norm": 1000,
}
_FIXED: dict[str, Any] = {
    "dropout": 0.0,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "attention_type": "default",
}
# Keys of diffusers' Transformer2DModel, as which PixArt was published first.
_FORMER: dict[str, Any] = {
    "double_self_attention": False,
    "only_cross_attention": False,
    "num_vector_embeds": None,
    "use_linear_projection": False,
}


class PixArtTransformer(nn.Module):
    """A transformer over patches of latents that attends to text: Chen et al. 2023 (PixArt-alpha),
    sec. 2.3.

    Attributes:
        config: every key of diffusers' PixArtTransformer2DModel.

    Args:
        config: one of which `odd` says nothing.

    Raises:
        ValueError: the sizes do not fit each other.
    """

    diffusers_name = "PixArtTransformer2DModel"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        known = {**_CHOICES, **_FIXED}
        self.config = {key: config.get(key, default) for key, default in known.items()}
        heads, patch = self.config["num_attention_heads"], self.config["patch_size"]
        width = heads * self.config["attention_head_dim"]
        text = self.config["caption_channels"]
        if self.config["sample_size"] < patch:
            raise ValueError(f"its sample_size is smaller than its patch_size of {patch}")
        if width % (12 if self.told_sizes else 4):
            raise ValueError(f"its width of {width} cannot be divided among its embeddings")
        if text is not None and self.config["cross_attention_dim"] != width:
            raise ValueError("its cross_attention_dim is not the width of its text")
        self.pos_embed = PatchEmbedding(self.config["in_channels"], width, patch)
        self.transformer_blocks = nn.ModuleList(
            Block(self.config, width) for _ in range(self.config["num_layers"])
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.proj_out = nn.Linear(width, patch * patch * self.out_channels)
        self.adaln_single = Modulation(width, sizes=self.told_sizes)
        self.caption_projection = None if text is None else TextProjection(text, width)
        for layer in self.modules():
            if isinstance(layer, AttentionLayer):
                layer.upcast = self.config["upcast_attention"]

    @staticmethod
    def odd(config: Mapping[str, Any]) -> str | None:
        """The first key of a config of another transformer than this class is; None if none is."""
        fixed = {**_FIXED, **_FORMER}
        known = _CHOICES.keys() | fixed.keys()
        for key, value in config.items():
            if key in fixed and value != fixed[key]:
                return key
            if key not in known and not key.startswith("_"):
                return key
        return None

    @property
    def told_sizes(self) -> bool:
        """True where it is told the picture's size and its ratio of sides."""
        told = self.config["use_additional_conditions"]
        return self.config["sample_size"] == 128 if told is None else told

    @property
    def out_channels(self) -> int:
        """Channels of its output."""
        return self.config["out_channels"] or self.config["in_channels"]

    def enable_gradient_checkpointing(self) -> None:
        """Compute blocks anew in the backward pass, so that their insides need no memory."""
        block: Any
        for block in self.transformer_blocks:
            block.checkpointing = True

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        added_cond_kwargs: Mapping[str, Tensor | None] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict; the arguments have diffusers' names.

        Args:
            hidden_states: x_t [B, C, H, W], whose sides are multiples of `patch_size`.
            encoder_hidden_states: text states [B, S, D].
            timestep: times [B].
            added_cond_kwargs: "resolution" [B, 2] and "aspect_ratio" [B, 1] where it is told them.
            cross_attention_kwargs: "spoilt": see `latentdiff.models.perturbation`.
            encoder_attention_mask: bool [B, S], True where the network may look.

        Returns:
            [B, out_channels, H, W].
        """
        spoilt = (cross_attention_kwargs or {}).get("spoilt")
        mask = encoder_attention_mask
        if mask is not None:
            mask = (1 - mask.to(hidden_states.dtype))[:, None, None] * -10000.0
        patch, states = self.config["patch_size"], encoder_hidden_states
        height, width = (side // patch for side in hidden_states.shape[-2:])
        places = self._positions(height, width, hidden_states.device)
        x = self.pos_embed(hidden_states, places)
        modulation, time = self.adaln_single(timestep, added_cond_kwargs, x.dtype)
        if self.caption_projection is not None:
            states = self.caption_projection(states)
        for block in self.transformer_blocks:
            x = run(block, x, states, modulation, mask, spoilt)
        shift, scale = (self.scale_shift_table[None] + time[:, None]).chunk(2, dim=1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _positions(self, height: int, width: int, device: torch.device) -> Tensor:
        base, scale = self.config["sample_size"], self.config["interpolation_scale"]
        scale = max(base // 64, 1) if scale is None else scale
        inner, base = self.proj_out.in_features, base // self.config["patch_size"]
        return positions(height, width, inner, base, scale, device)


@lru_cache(maxsize=8)
def positions(
    height: int, width: int, inner: int, base: int, scale: float, device: torch.device
) -> Tensor:
    """Sines and cosines of each place of a grid, float32 [1, height * width, inner]: Dosovitskiy et
    al. 2020, app. D.4, in two dimensions; first those of its column, then those of its row.

    Args:
        height: of the grid.
        width: of the grid.
        inner: width of the embedding, a multiple of 4.
        base: the side of the grid that the network was trained on, over which any is spread.
        scale: places are divided by this.
        device: where they are kept; they are computed on the CPU.
    """
    frequencies = 1.0 / 10000 ** (torch.arange(inner // 4, dtype=torch.float64) / (inner / 4))

    def of(count: int) -> Tensor:
        places = torch.arange(count, dtype=torch.float32) / (count / base) / scale
        angles = torch.outer(places.double(), frequencies)
        return torch.cat([angles.sin(), angles.cos()], 1)

    rows, columns = of(height)[:, None], of(width)[None]
    grid = [columns.expand(height, -1, -1), rows.expand(-1, width, -1)]
    return torch.cat(grid, -1).flatten(0, 1).float()[None].to(device)


class PatchEmbedding(nn.Module):
    """Embeds patches of latents, and adds the embedding of each place."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)
        return (x + places).to(x.dtype)


class Modulation(nn.Module):
    """Times, and sizes where it is told any, to the shifts, scales and gates of all blocks:
    adaLN-single of Chen et al. 2023 (PixArt-alpha), sec. 2.3."""

    def __init__(self, width: int, *, sizes: bool) -> None:
        super().__init__()
        self.emb = Embeddings(width, sizes=sizes)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, t: Tensor, sizes: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Modulation [B, 6 D] and the embedding of the time [B, D]."""
        time = self.emb(t, sizes, dtype)
        return self.linear(silu(time)), time


class Embeddings(nn.Module):
    """Embeds times, and the picture's size and its ratio of sides."""

    def __init__(self, width: int, *, sizes: bool) -> None:
        super().__init__()
        self.timestep_embedder = TimeEmbedding(_WAVES, width)
        self.sizes = sizes
        if sizes:
            self.resolution_embedder = TimeEmbedding(_WAVES, width // 3)
            self.aspect_ratio_embedder = TimeEmbedding(_WAVES, width // 3)

    def forward(self, t: Tensor, sizes: Any, dtype: torch.dtype) -> Tensor:
        time = self.timestep_embedder(sinusoids(t, _WAVES).to(dtype))
        if not self.sizes:
            return time
        told = [
            embed(sinusoids(sizes[name].flatten(), _WAVES).to(dtype)).reshape(len(t), -1)
            for name, embed in (
                ("resolution", self.resolution_embedder),
                ("aspect_ratio", self.aspect_ratio_embedder),
            )
        ]
        return time + torch.cat(told, dim=1)


class TextProjection(nn.Module):
    """Text states to the width of the network."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inside, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear_2(gelu(self.linear_1(states), approximate="tanh"))


class TanhGELU(nn.Module):
    """A linear layer and a GELU by tanh."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The feed-forward part of a block, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Linear(4 * width, width)
        self.net = nn.ModuleList([TanhGELU(width, 4 * width), nn.Dropout(0.0), last])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward, each around a residual: [B, L, D].

    Attributes:
        checkpointing: see `latentdiff.models.blocks.run`.
    """

    checkpointing = False

    def __init__(self, config: Mapping[str, Any], width: int) -> None:
        super().__init__()
        heads, bias, eps = (
            config[key] for key in ("num_attention_heads", "attention_bias", "norm_eps")
        )
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=eps)
        self.attn1 = AttentionLayer(width, heads, bias=bias)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=eps)
        self.attn2 = AttentionLayer(width, heads, context=config["cross_attention_dim"], bias=bias)
        self.ff = FeedForward(width)
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))

    def forward(
        self, x: Tensor, states: Tensor, modulation: Tensor, mask: Tensor | None, spoilt: Any
    ) -> Tensor:
        told = self.scale_shift_table[None] + modulation.unflatten(1, (6, -1))
        shift, scale, gate, last_shift, last_scale, last_gate = told.chunk(6, dim=1)
        h = self.attn1(self.norm1(x) * (1 + scale) + shift, spoilt=spoilt)
        x = gate * h + x
        x = self.attn2(x, states, mask, spoilt) + x
        h = self.ff(self.norm2(x) * (1 + last_scale) + last_shift)
        return last_gate * h + x

"""The encoder of T5, with the tensor names of transformers' T5EncoderModel."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

from latentdiff.models.clip_text import TextOutput


@dataclass
class T5TextConfig:
    """What transformers' T5Config holds, with its defaults.

    `dense_act_fn` and `is_gated_act` follow from `feed_forward_proj` where they are None.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    classifier_dropout: float = 0.0
    is_decoder: bool = False
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None

    @property
    def gated(self) -> bool:
        """True where the feed-forward layers have a gate: Shazeer 2020, eq. 5."""
        told = self.is_gated_act
        return self.feed_forward_proj.startswith("gated-") if told is None else told

    @property
    def activation(self) -> str:
        """The activation of the feed-forward layers."""
        if self.dense_act_fn is not None:
            return self.dense_act_fn
        named = self.feed_forward_proj.rpartition("-")[2]
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else named


def gelu_new(x: Tensor) -> Tensor:
    """The GELU by tanh, in the order of operations of transformers: Hendrycks & Gimpel 2016,
    sec. 2."""
    inside = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inside))


_ACTIVATIONS = {"relu": relu, "gelu_new": gelu_new}


class T5TextEncoder(nn.Module):
    """A transformer over tokens with relative positions: Raffel et al. 2020, sec. 2.1.

    Args:
        config: one that `understands` accepts.
    """

    transformers_name = "T5EncoderModel"

    def __init__(self, config: T5TextConfig) -> None:
        super().__init__()
        self.config = config
        self.shared: nn.Module = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config)
        self.encoder.embed_tokens = self.shared

    @staticmethod
    def understands(config: T5TextConfig) -> bool:
        """True for a config of an encoder that this class is."""
        buckets = config.relative_attention_num_buckets
        return (
            config.feed_forward_proj in ("relu", "gated-gelu")
            and config.activation in _ACTIVATIONS
            and not config.is_decoder
            # There are buckets of one distance each, and of many: the logarithm is defined.
            and 1 <= buckets // 4 < config.relative_attention_max_distance
        )

    @property
    def device(self) -> torch.device:
        return self.encoder.final_layer_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.final_layer_norm.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens."""
        return self.shared

    def set_input_embeddings(self, table: nn.Module) -> None:
        """Replace the table of tokens."""
        self.shared = self.encoder.embed_tokens = table

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TextOutput:
        """Ids [B, L], and bool [B, L], True where a token is seen, -> states [B, L, D]."""
        return TextOutput(self.encoder(input_ids, attention_mask))


class Stack(nn.Module):
    """The transformer layers, applied in turn; the first holds the bias of positions of all."""

    embed_tokens: nn.Module

    def __init__(self, config: T5TextConfig) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(config, first=not n) for n in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        x = self.dropout(self.embed_tokens(ids))
        first: Any = self.block[0]
        bias = first.layer[0].SelfAttention.bias(ids.shape[1])
        if mask is not None and not bool(mask.all()):
            seen = mask.bool()[:, None, None]
            bias = torch.where(seen, bias, torch.finfo(bias.dtype).min)
        for block in self.block:
            x = block(x, bias)
        return self.dropout(self.final_layer_norm(x))


class Block(nn.Module):
    """One transformer layer: attention, then the feed-forward part."""

    def __init__(self, config: T5TextConfig, *, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionPart(config, first=first), FeedForwardPart(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for part in self.layer:
            x = part(x, bias)
        return x


class RMSNorm(nn.Module):
    """x over its root mean square, in float32: Zhang & Sennrich 2019, eq. 4."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class AttentionPart(nn.Module):
    """Self-attention around a residual."""

    def __init__(self, config: T5TextConfig, *, first: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, first=first)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.dropout(self.SelfAttention(self.layer_norm(x), bias))


class SelfAttention(nn.Module):
    """Attention of each token to all, whose logits are not divided and have a bias for distance."""

    def __init__(self, config: T5TextConfig, *, first: bool) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_heads, config.dropout_rate
        self.farthest = config.relative_attention_max_distance
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if first:
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(buckets, config.num_heads)

    def bias(self, length: int) -> Tensor:
        """What is added to the logits for the distance of two places [1, heads, L, L]."""
        table = self.relative_attention_bias
        place = torch.arange(length, device=table.weight.device)
        distance = place[None, :] - place[:, None]
        numbers = buckets_of(distance, table.num_embeddings, self.farthest)
        return table(numbers).permute(2, 0, 1)[None].contiguous()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        drop = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=1.0)
        return self.o(mixed.transpose(1, 2).flatten(2))


def buckets_of(distance: Tensor, count: int, farthest: int) -> Tensor:
    """The bucket of each distance in tokens, int64: Raffel et al. 2020, sec. 2.1.

    Half of `count` are for tokens in front and half for those behind; of each half, half are for
    one distance and the others for ranges of them, in equal logarithms, up to `farthest`.
    """
    half = count // 2
    behind = (distance > 0) * half
    distance = distance.abs()
    single = half // 2
    far = torch.log(distance.float() / single) / math.log(farthest / single) * (half - single)
    ranges = (single + far.to(torch.int64)).clamp(max=half - 1)
    return behind + torch.where(distance < single, distance, ranges)


class FeedForwardPart(nn.Module):
    """The feed-forward layers around a residual."""

    def __init__(self, config: T5TextConfig) -> None:
        super().__init__()
        self.DenseReluDense = (GatedFeedForward if config.gated else FeedForward)(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.dropout(self.DenseReluDense(self.layer_norm(x)))


class FeedForward(nn.Module):
    """Two linear layers."""

    def __init__(self, config: T5TextConfig) -> None:
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(self.activation(self.wi(x))))


class GatedFeedForward(nn.Module):
    """Two linear layers, the first with a gate, as of T5 1.1: Shazeer 2020, eq. 6."""

    def __init__(self, config: T5TextConfig) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(self.activation(self.wi_0(x)) * self.wi_1(x)))

"""The text encoder of CLIP, with the tensor names of transformers' classes of it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


@dataclass
class ClipTextConfig:
    """What transformers' CLIPTextConfig holds, with its defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int | None = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | None = 0.0
    initializer_range: float = 0.02
    initializer_factor: float | None = 1.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int | list[int] | None = 49407


def quick_gelu(x: Tensor) -> Tensor:
    """The activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


@dataclass(frozen=True, slots=True)
class TextOutput:
    """What a text encoder says, by transformers' names.

    Attributes:
        last_hidden_state: the states behind the last layer norm [B, L, D].
        hidden_states: the states in front of the first layer and behind each, before that norm,
            where they are asked for.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class ClipTextEncoder(nn.Module):
    """A causal transformer over tokens: Radford et al. 2021, sec. 2.4.

    Args:
        config: one that `understands` accepts.

    Raises:
        ValueError: the heads do not divide the width.
    """

    transformers_name = "CLIPTextModel"

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"{config.num_attention_heads} heads for {config.hidden_size}")
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @staticmethod
    def understands(config: ClipTextConfig) -> bool:
        """True for a config of a text encoder that this class is."""
        return config.hidden_act in _ACTIVATIONS and not config.attention_dropout

    @property
    def device(self) -> torch.device:
        return self.final_layer_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.final_layer_norm.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens."""
        return self.embeddings.token_embedding

    def set_input_embeddings(self, table: nn.Module) -> None:
        """Replace the table of tokens."""
        self.embeddings.token_embedding = table

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False) -> TextOutput:
        """Ids [B, L] -> states [B, L, D]."""
        states = [self.embeddings(input_ids)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        last = self.final_layer_norm(states[-1])
        return TextOutput(last, tuple(states) if output_hidden_states else None)


class ClipTextEncoderWithProjection(ClipTextEncoder):
    """A text encoder with the map from its last state to the space that it shares with pictures.

    Args:
        config: one that `understands` accepts, with a `projection_dim`.
    """

    transformers_name = "CLIPTextModelWithProjection"

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__(config)
        if config.projection_dim is None:
            raise ValueError("no projection_dim")
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)


class Embeddings(nn.Module):
    """Embeds tokens, and adds the embedding of each position."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[-1]]


class Layers(nn.Module):
    """The transformer layers, applied in turn."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Layer(nn.Module):
    """Causal self-attention and two layers behind it, each around a residual."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = SelfAttention(width, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
    """Attention of each token to those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The feed-forward part of a transformer layer."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))

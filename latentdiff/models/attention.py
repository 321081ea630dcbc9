"""Attention implementations of our networks and of those of diffusers."""

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from latentdiff.diffusion.condition import ImageTokens
from latentdiff.errors import UserError
from latentdiff.registry import check_name

# Logits of one head up to which the explicit product trains faster in bfloat16 on a CPU: measured
# 2.6 times at 64 x 64, 1.4 at 256 x 256, 1.5 at 4096 x 77, the same at 1024 x 1024.
_EXPLICIT = 2**19

Attention = Literal["auto", "eager", "sdpa", "xformers"]


Shown = Sequence[tuple[Tensor, Tensor, float]]
"""Keys and values [B, S, D] of pictures, and the strength of what is attended to among them."""


def sdpa(
    attn: Any,
    x: Tensor,
    states: Tensor | None = None,
    mask: Tensor | None = None,
    shown: Shown = (),
) -> Tensor:
    """Attend by torch's fused kernel.

    Args:
        attn: the layer: `to_q`, `to_k`, `to_v`, `to_out`, `heads`.
        x: [B, L, D].
        states: [B, S, E]; None: x itself.
        mask: what is added to the logits [B, 1, 1, S].
        shown: pictures that are attended to, each by itself, with the same queries.

    Returns:
        [B, L, D].
    """
    return _attended(fused, attn, _projected(attn, x, states), mask, shown)


def explicit(
    attn: Any,
    x: Tensor,
    states: Tensor | None = None,
    mask: Tensor | None = None,
    shown: Shown = (),
) -> Tensor:
    """Attend by explicit matrix products; see `sdpa`."""
    return _attended(_products, attn, _projected(attn, x, states), mask, shown)


def auto(
    attn: Any,
    x: Tensor,
    states: Tensor | None = None,
    mask: Tensor | None = None,
    shown: Shown = (),
) -> Tensor:
    """Attend by what is fastest: `sdpa`, or where gradients are wanted in bfloat16 on a CPU, whose
    fused backward pass is slow, `explicit`, up to a size at which both take as long."""
    seen = x if states is None else states
    if not torch.is_grad_enabled() or x.device.type != "cpu":
        return sdpa(attn, x, states, mask, shown)
    lowered = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    halves = torch.bfloat16 in (lowered, x.dtype)
    small = x.shape[1] * seen.shape[1] <= _EXPLICIT
    return (explicit if halves and small else sdpa)(attn, x, states, mask, shown)


def xformers(
    attn: Any,
    x: Tensor,
    states: Tensor | None = None,
    mask: Tensor | None = None,
    shown: Shown = (),
) -> Tensor:
    """Attend by xformers' kernel; see `sdpa`."""
    return _attended(_xformers, attn, _projected(attn, x, states), mask, shown)


Projected = tuple[Tensor, Tensor, Tensor]
"""Query [B, heads, L, D / heads], key and value [B, heads, S, D / heads]."""


def by_heads(attn: Any, part: Tensor) -> Tensor:
    """[B, S, D] -> [B, heads, S, D / heads]."""
    return part.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def _projected(attn: Any, x: Tensor, states: Tensor | None) -> Projected:
    """Project x [B, L, D], and the states that are attended to [B, S, E]; None is x itself."""
    seen = x if states is None else states
    q, k, v = attn.to_q(x), attn.to_k(seen), attn.to_v(seen)
    return by_heads(attn, q), by_heads(attn, k), by_heads(attn, v)


Kernel = Callable[[Any, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(layer, q, k, v, mask) -> softmax(q k) v [B, heads, L, D / heads]."""


def _attended(
    kernel: Kernel, attn: Any, projected: Projected, mask: Tensor | None, shown: Shown
) -> Tensor:
    """What a layer gives, [B, L, D], by a kernel: see `sdpa`."""
    q, k, v = projected
    mixed = with_shown(kernel, attn, q, kernel(attn, q, k, v, mask), shown)
    return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))


def with_shown(kernel: Kernel, attn: Any, q: Tensor, mixed: Tensor, shown: Shown) -> Tensor:
    """What is mixed of the text, and added to it what queries q find in pictures.

    Ye et al. 2023 (IP-Adapter), the section on decoupled cross-attention:
    Z = softmax(Q K) V + scale * softmax(Q K') V'.
    """
    for keys, values, scale in shown:
        found = kernel(attn, q, by_heads(attn, keys), by_heads(attn, values), None)
        mixed = mixed + scale * found
    return mixed


def fused(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The kernel of `sdpa`."""
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _products(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    scale = q.shape[-1] ** -0.5
    q_, k_ = (q.float(), k.float()) if attn.upcast else (q, k)
    if mask is None:
        start, beta = q_.new_empty(len(q), q.shape[1], k.shape[1]), 0
    else:
        start, beta = mask.squeeze(1).repeat_interleave(attn.heads, dim=0).to(q_.dtype), 1
    scores = torch.baddbmm(start, q_, k_.transpose(1, 2), beta=beta, alpha=scale)
    mixed = torch.bmm(scores.softmax(dim=-1).to(q.dtype), v)
    return mixed.unflatten(0, (-1, attn.heads))


def _xformers(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    if mask is not None:
        mask = mask.expand(-1, attn.heads, q.shape[2], -1)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return memory_efficient_attention(q, k, v, attn_bias=mask).transpose(1, 2)


class AttentionLayer(nn.Module):
    """Multi-head attention of [B, L, D] to itself, or to states [B, S, context].

    Attributes:
        processor: computes the answer: `auto`, `sdpa`, `explicit` or `xformers`, or one around it.
        number: its place among the cross-attention layers of its network.
    """

    def __init__(
        self, width: int, heads: int, *, context: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.number = 0
        self.is_cross_attention = context is not None
        self.upcast = False
        self.processor: Any = auto
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context or width, width, bias=bias)
        self.to_v = nn.Linear(context or width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(
        self,
        x: Tensor,
        states: Any = None,
        mask: Tensor | None = None,
        spoilt: Any = None,
        images: Sequence[ImageTokens] = (),
    ) -> Tensor:
        """Attend; `mask` is added to the logits [B, 1, 1, S], `spoilt` goes to the processor."""
        told: dict[str, Any] = {} if spoilt is None else {"spoilt": spoilt}
        if images:
            told["shown"] = [
                (*each.adapter.keys_and_values(self.number, each.tokens), each.scale)
                for each in images
            ]
        return self.processor(self, x, states, mask, **told)


def set_attention(model: nn.Module, backend: Attention = "auto") -> str:
    """Choose the attention of a U-Net or autoencoder.

    Args:
        model: on its device and in its dtype.
        backend: "eager" is an explicit matrix product; "sdpa" torch's fused one; "xformers" that
            library's; "auto" is sdpa, but where our own networks train in bfloat16 on a CPU the
            explicit product, whose backward pass is the faster one there.

    Returns:
        The backend chosen.

    Raises:
        UserError: unknown backend, or xformers is not installed or the model is not on CUDA.
    """
    check_name("attention backend", backend, get_args(Attention))
    if backend == "xformers":
        _check_xformers(next(model.parameters()).device)
    processor = {"auto": auto, "eager": explicit, "sdpa": sdpa, "xformers": xformers}[backend]
    theirs = sys.modules.get("diffusers.models.attention_processor")  # else no layer is theirs
    layer: Any
    for layer in model.modules():
        if isinstance(layer, AttentionLayer):
            layer.processor = processor
        # Attention with added keys has processors of its own kind, which diffusers has set.
        elif theirs and isinstance(layer, theirs.Attention) and layer.added_kv_proj_dim is None:
            layer.set_processor(getattr(theirs, _OF_DIFFUSERS[backend])())
    return backend


_OF_DIFFUSERS = {
    "auto": "AttnProcessor2_0",
    "eager": "AttnProcessor",
    "sdpa": "AttnProcessor2_0",
    "xformers": "XFormersAttnProcessor",
}


def _check_xformers(device: torch.device) -> None:
    if find_spec("xformers") is None:
        raise UserError(
            "attention 'xformers': the package is not installed; pip install 'latentdiff[xformers]'"
            " or use 'sdpa'."
        )
    if device.type != "cuda":
        raise UserError("attention 'xformers' runs on CUDA only; use 'auto' here.")

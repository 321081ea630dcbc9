"""Layers of peft that learn a LoHa, a LoKr or a DoRA, and what they have learned."""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentdiff.lora.changes import Decomposed, Hadamard, Kronecker, LowRank
from latentdiff.lora.factors import Change, Factors

Kind = Literal["lora", "loha", "lokr", "dora"]

# Where a fresh one is zero, so that it changes nothing at first; all else is drawn.
_ZERO = ("hada_w2_a", "lokr_w1", "lokr_w1_a")


def inject_lycoris(
    model: nn.Module,
    kind: Kind,
    modules: Sequence[str],
    rank: int,
    alpha: float,
    name: str,
    random: torch.Generator,
) -> None:
    """Put fresh layers of a LoHa or a LoKr around modules of a network, in float32.

    Factors are drawn as He et al. 2015 do, as in peft, but for those that start at zero.
    """
    from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model

    config = (LoHaConfig if kind == "loha" else LoKrConfig)(
        r=rank,
        alpha=alpha,  # pyright: ignore[reportArgumentType]  (a fraction is as good)
        target_modules="|".join(map(re.escape, sorted(modules))),
    )
    inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
    for module in sorted(modules):
        layer: Any = model.get_submodule(module)
        device = layer.get_base_layer().weight.device
        for end in layer.adapter_layer_names:
            values = getattr(layer, end)
            if name in values:
                drawn = torch.zeros(values[name].shape)
                if end not in _ZERO:
                    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=random)
                values[name] = nn.Parameter(drawn.to(device))
    model.train(model.training)


def begin_dora(layer: Any, name: str) -> None:
    """Let a DoRA start at the norms of its weight, for each output: Liu et al. 2024, sec. 4.1."""
    weight = layer.get_base_layer().weight.detach().float()
    norms = weight.flatten(1).norm(dim=1)
    norms = norms if weight.ndim == 2 else norms.reshape(1, -1, *[1] * (weight.ndim - 2))
    layer.lora_magnitude_vector[name].weight = nn.Parameter(norms)


def parameters_of(layer: Any, name: str) -> list[nn.Parameter]:
    """What a layer of peft learns."""
    found: list[nn.Parameter] = []
    for end in dict.fromkeys(layer.adapter_layer_names):  # peft names the norms of a DoRA twice
        held = getattr(layer, end)
        if name in held:
            held = held[name]
            found += [held] if isinstance(held, nn.Parameter) else list(held.parameters())
    return found


def learned_by(layer: Any, name: str) -> Factors | Change:
    """What a layer of peft has learned, copied to the CPU."""
    if hasattr(layer, "lora_A"):
        down, up = (_copy(half[name].weight) for half in (layer.lora_A, layer.lora_B))
        factors = Factors(down, up, float(layer.lora_alpha[name]))
        if name not in layer.lora_magnitude_vector:
            return factors
        norms = _copy(layer.lora_magnitude_vector[name].weight)
        return Decomposed(LowRank(factors), norms.reshape(-1, *[1] * (down.ndim - 1)), 0)
    parts = {
        end: _copy(getattr(layer, end)[name])
        for end in layer.adapter_layer_names
        if name in getattr(layer, end)
    }
    kind = Hadamard if "hada_w1_a" in parts else Kronecker
    return kind(parts, float(layer.alpha[name]) / layer.r[name])


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)

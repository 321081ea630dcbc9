"""Attention implementations of diffusers networks."""

from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import nn

from latentdiff.errors import UserError
from latentdiff.registry import check_name

Attention = Literal["auto", "eager", "sdpa", "xformers"]


def set_attention(model: nn.Module, backend: Attention = "auto") -> str:
    """Choose the attention of a U-Net or autoencoder by where and in which precision it now is.

    Args:
        model: on its device and in its dtype.
        backend: "eager" is an explicit matrix product, "sdpa" torch's fused one, "xformers" that
            library's. "auto" is sdpa, except in bfloat16 on a CPU: eager, never seen slower there.

    Returns:
        The backend chosen.

    Raises:
        UserError: unknown backend, or xformers is not installed or the model is not on CUDA.
    """
    from diffusers.models import attention_processor as processors

    check_name("attention backend", backend, get_args(Attention))
    parameter = next(model.parameters())
    if backend == "auto":
        slow = parameter.device.type == "cpu" and parameter.dtype == torch.bfloat16
        backend = "eager" if slow else "sdpa"
    if backend == "xformers":
        _check_xformers(parameter.device)
        processor = processors.XFormersAttnProcessor()
    elif backend == "eager":
        processor = processors.AttnProcessor()
    else:
        processor = processors.AttnProcessor2_0()
    for module in model.modules():
        # Attention with added keys has processors of its own kind, which diffusers has set.
        if isinstance(module, processors.Attention) and module.added_kv_proj_dim is None:
            module.set_processor(processor)  # pyright: ignore[reportArgumentType]
    return backend


def _check_xformers(device: torch.device) -> None:
    if find_spec("xformers") is None:
        raise UserError(
            "attention 'xformers': the package is not installed; pip install 'latentdiff[xformers]'"
            " or use 'sdpa'."
        )
    if device.type != "cuda":
        raise UserError("attention 'xformers' runs on CUDA only; use 'auto' here.")

"""Values in the configs of networks, checked against what their builders declare."""

import inspect
import re
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from latentdiff.errors import UserError

_Size = int | tuple[int, ...]

DIFFUSERS_TYPES: dict[str, Any] = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "freq_shift"), int),
    **dict.fromkeys(("norm_num_groups", "addition_embed_type_num_heads"), int | None),
    "addition_time_embed_dim": int | None,
    "projection_class_embeddings_input_dim": int | None,
    **dict.fromkeys(("down_block_types", "up_block_types"), tuple[str, ...]),
    **dict.fromkeys(("layers_per_block", "cross_attention_dim", "attention_head_dim"), _Size),
    **dict.fromkeys(("flip_sin_to_cos", "use_linear_projection", "upcast_attention"), bool),
    **dict.fromkeys(("force_upcast", "use_quant_conv", "use_post_quant_conv"), bool),
    **dict.fromkeys(("latents_mean", "latents_std"), tuple[float, ...] | None),
    "time_cond_proj_dim": int | None,
    "conditioning_channels": int,
    "conditioning_embedding_out_channels": tuple[int, ...],
    "global_pool_conditions": bool,
    **dict.fromkeys(
        (
            *("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels"),
            *("num_encoder_blocks", "num_decoder_blocks"),
        ),
        tuple[int, ...],
    ),
    **dict.fromkeys(("latent_magnitude", "latent_shift"), float),
    "transformer_layers_per_block": _Size | tuple[tuple[int, ...], ...],
    "mid_block_add_attention": bool,
    "norm_eps": float,
    "sample_size": _Size | None,
    "scaling_factor": float,
    "shift_factor": float | None,
    "addition_embed_type": str | None,
    "class_embed_type": str | None,
    "num_class_embeds": int | None,
}
"""Types of the keys that our own networks read, whose diffusers' classes are then not imported."""


def check_types(config: Mapping[str, object], declared: Mapping[str, Any], name: str) -> None:
    """Check the type of every value that a builder of diffusers or transformers takes.

    They themselves look at few of them before the first call, where a wrong one ends in a
    traceback.

    Args:
        config: the config.
        declared: annotations by key.
        name: what the config is called in messages.

    Raises:
        UserError: a value is of another type than is declared.
    """
    for key, value in config.items():
        wanted = declared.get(key, inspect.Parameter.empty)
        if not _fits(value, wanted):
            told = getattr(wanted, "__name__", None) if isinstance(wanted, type) else None
            raise UserError(f"{name}: {key} is {value!r:.60}; it must be {told or wanted!s}.")


def check_above_zero(config: Mapping[str, object], keys: Iterable[str], name: str) -> None:
    """Check that sizes, which may be lists, are above 0.

    Raises:
        UserError: one is not.
    """
    for key in keys:
        value = config.get(key, 1)
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(number, int | float) and number <= 0 for number in numbers):
            raise UserError(f"{name}: {key} is {value!r:.60}; it must be above 0.")


def _fits(value: object, wanted: Any) -> bool:
    """Tell if a JSON value is of an annotated type; lists are tuples of any length."""
    origin = get_origin(wanted)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(wanted))
    if wanted is tuple or wanted is list or origin in (tuple, list):
        inside = next(iter(get_args(wanted)), int)
        return isinstance(value, list | tuple) and all(_fits(one, inside) for one in value)
    if wanted in (bool, NoneType):  # diffusers' scripts write null for False
        return value is None or (wanted is bool and isinstance(value, bool))
    if wanted in (int, float):
        numbers = int if wanted is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return not isinstance(wanted, type) or wanted is not str or isinstance(value, str)


def refuse_quantised(config: Mapping[str, object], name: str) -> None:
    """Refuse the config of a network whose weights are not plain numbers.

    Raises:
        UserError: it declares a quantisation.
    """
    if config.get("quantization_config") is not None:
        raise UserError(f"{name}: its quantization_config asks for weights that do not load here.")


def older_than(config: Mapping[str, object], major: int, minor: int) -> bool:
    """Tell if a config was written by a version of diffusers before this one."""
    version = re.match(r"(\d{1,4})\.(\d{1,4})", str(config.get("_diffusers_version")))
    return version is not None and (int(version[1]), int(version[2])) < (major, minor)

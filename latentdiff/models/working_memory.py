"""The memory that a call of a U-Net works in, estimated by its config before anything is computed.

Attention is taken to be fused, so that no product of all places with all places is kept.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

# Activations as wide as a level that are there at once while its busiest part is computed: the
# feed-forward layer of a transformer, gated (Shazeer 2020), beside what it is added to.
_AT_ONCE = 14
# oneDNN keeps a layer's input and output in a layout of its own, too. With this the estimate is
# within a fifth of what Linux counted for a call of emoji64, of a U-Net of three levels and of
# Stable Diffusion 1's, at latents of 32 to 128 a side.
_LAYOUTS = 2


def unet_bytes(module: nn.Module, rows: int, height: int, width: int) -> int | None:
    """About the bytes of the activations of one call.

    Args:
        module: a U-Net, ours or of diffusers.
        rows: B of the call: pictures times branches.
        height: of the latents.
        width: of the latents.

    Returns:
        None for a network whose config does not tell its levels.
    """
    config = getattr(module, "config", None)
    widths = config.get("block_out_channels") if isinstance(config, Mapping) else None
    layers: Any = config.get("layers_per_block") if isinstance(config, Mapping) else None
    if not isinstance(widths, list | tuple) or layers is None:
        return None
    each = list(layers) if isinstance(layers, list | tuple) else [layers] * len(widths)
    cells = [height * width / 4**level for level in range(len(widths))]
    sizes = [wide * count for wide, count in zip(widths, cells, strict=True)]
    kept = sum((count + 1) * size for count, size in zip(each, sizes, strict=True))  # skips
    numbers = _LAYOUTS * rows * (kept + _AT_ONCE * max(sizes))
    return round(numbers * next(module.parameters()).element_size())

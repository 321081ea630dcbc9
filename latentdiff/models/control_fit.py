"""Checks that a ControlNet or a T2I-Adapter fits a model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.models.control import AdapterNetwork, ControlNetwork

if TYPE_CHECKING:
    from latentdiff.models.network import Network


def check_control(control: ControlNetwork, network: "Network", factor: int) -> None:
    """Check that a ControlNet fits a model.

    Args:
        control: the ControlNet.
        network: of the model.
        factor: pixels per latent, along a side.

    Raises:
        UserError: it does not.
    """
    if network.part != "unet":
        raise UserError(f"control: {control.name} stands beside a U-Net, and this model has none.")
    config = control.module.config
    unet: Any = network.module
    added = unet.config["addition_embed_type"]
    context = config["cross_attention_dim"]
    wide = {*context} if isinstance(context, list | tuple) else {context}
    attends = "CrossAttn" in " ".join((config["mid_block_type"], *config["down_block_types"]))
    if not attends:
        wide = {network.width}  # it reads none
    widths = [[*each["block_out_channels"]] for each in (config, unet.config)]
    layers = [
        [*count]
        if isinstance(count := each["layers_per_block"], list | tuple)
        else [count] * len(own)
        for each, own in zip((config, unet.config), widths, strict=True)
    ]
    for what, own, wanted in (
        ("latents of {} channels", config["in_channels"], network.channels),
        ("text states of width {}", min(wide), network.width),
        ("an addition_embed_type of {}", config["addition_embed_type"], added),
        ("{} pixels a latent", control.factor, factor),
        ("control pictures of {} channels", config["conditioning_channels"], 3),
        ("levels of widths {}", *widths),
        ("levels of {} layers", *layers),
    ):
        if own != wanted:
            raise UserError(
                f"control: {control.name} is for {what.format(own)}, the model has "
                f"{what.format(wanted)}: it belongs to another model."
            )


def check_maps(
    adapter: AdapterNetwork, maps: Sequence[Tensor], network: "Network", size: tuple[int, int]
) -> None:
    """Check that what a T2I-Adapter says fits the levels of a model.

    Args:
        adapter: the adapter.
        maps: that it has made.
        network: of the model.
        size: height and width of the latents.

    Raises:
        UserError: it does not.
    """
    if network.part != "unet":
        raise UserError(f"control: {adapter.name} stands beside a U-Net, and this model has none.")
    unet: Any = network.module
    kinds, widths = unet.config["down_block_types"], [*unet.config["block_out_channels"]]
    levels = len(widths)
    # A level adds before it halves, but one without attention behind.
    halved = [
        level + (level < levels - 1 and "CrossAttn" not in kind) for level, kind in enumerate(kinds)
    ]
    wanted = [
        (width, *(-(-side // 2**times) for side in size))
        for width, times in [*zip(widths, halved, strict=True), (widths[-1], levels - 1)]
    ]
    found = [tuple(one.shape[1:]) for one in maps]
    if found not in (wanted, wanted[:-1]):
        raise UserError(
            f"control: {adapter.name} gives maps of {found} (channels, height, width), the model's "
            f"levels are {wanted[:-1]}: it belongs to another model."
        )

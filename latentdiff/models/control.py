"""ControlNets and T2I-Adapters as nouns: what they add to the network that they stand beside."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from latentdiff.diffusion.condition import Condition, Hint, Residuals
from latentdiff.errors import UserError
from latentdiff.models.controlnet import ControlNet

if TYPE_CHECKING:
    from diffusers.models.adapter import T2IAdapter

    from latentdiff.models.network import Network

_BRIGHTNESS = [[[0.299]], [[0.587]], [[0.114]]]


@dataclass(frozen=True, eq=False)
class ControlNetwork:
    """A ControlNet that is loaded; threads may share it.

    Attributes:
        module: its weights.
        name: for people.
    """

    module: ControlNet
    name: str = "controlnet"

    @property
    def factor(self) -> int:
        """Pixels of a control picture per latent, along a side."""
        return 2 ** (len(self.module.config["conditioning_embedding_out_channels"]) - 1)

    @property
    def pools(self) -> bool:
        """True where the means of its maps alone are told (of whole pictures, as "shuffle" is)."""
        return self.module.config["global_pool_conditions"]

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def on(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same network there; a copy where it is elsewhere now."""
        if (self.device, self.dtype) == (device, dtype):
            return self
        return replace(self, module=copy.deepcopy(self.module).to(device, dtype))

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> tuple[Tensor]:
        """Control pictures [B, 3, H, W] in [0, 1] -> one map [B, W, h, w], once a run."""
        return (self.module.embed(pictures.to(self.device, self.dtype)),)

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        states: Tensor,
        mask: Tensor | None,
        added: Mapping[str, Tensor] | None,
        hint: Hint,
    ) -> Residuals:
        """What a hint adds to the network at x_t [B, C, h, w], times its scales.

        In guess mode (Zhang et al. 2023, appendix; diffusers' rule) the skips have less to say the
        larger their maps are: from 0.1 to 1, evenly in the logarithm.
        """
        skips, middle = self.module(x, t, states, hint.embedded[0].to(x), mask, added)
        scale = hint.scale.to(x)[:, None, None, None]
        told = [*skips, middle]
        if hint.guess and not self.pools:
            shares = torch.logspace(-1, 0, len(told), device=x.device)
            told = [one * (share * scale) for one, share in zip(told, shares.to(x), strict=True)]
        else:
            told = [one * scale for one in told]
        if self.pools:
            told = [one.mean((2, 3), keepdim=True) for one in told]
        return Residuals(skips=told)


@dataclass(frozen=True, eq=False)
class AdapterNetwork:
    """A T2I-Adapter that is loaded; threads may share it.

    Mou et al. 2023 (T2I-Adapter). What it says of a control picture knows neither x_t nor the text,
    and so it is computed once a run.

    Attributes:
        module: its weights.
        name: for people.
    """

    module: "T2IAdapter"
    name: str = "t2i-adapter"

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def on(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same network there; a copy where it is elsewhere now."""
        if (self.device, self.dtype) == (device, dtype):
            return self
        module: Any = copy.deepcopy(self.module)
        return replace(self, module=module.to(device, dtype))

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Control pictures [B, 3, H, W] in [0, 1] -> a map for each level, once a run.

        One of one channel sees how bright they are (ITU-R BT.601).
        """
        config: Any = self.module.config
        pictures = pictures.to(self.device, self.dtype)
        if config["in_channels"] == 1:
            pictures = (pictures * pictures.new_tensor(_BRIGHTNESS)).sum(1, keepdim=True)
        beyond = [-side % config["downscale_factor"] for side in pictures.shape[-2:]]
        padded = torch.nn.functional.pad(pictures, (0, beyond[1], 0, beyond[0]), mode="replicate")
        return tuple(self.module(padded))

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        states: Tensor,
        mask: Tensor | None,
        added: Mapping[str, Tensor] | None,
        hint: Hint,
    ) -> Residuals:
        """What a hint adds to the network, times its scales."""
        scale = hint.scale.to(x)[:, None, None, None]
        return Residuals(levels=[one.to(x) * scale for one in hint.embedded])


def residuals(
    condition: Condition, x: Tensor, t: Tensor, added: Mapping[str, Tensor] | None
) -> Residuals | None:
    """The sum of what the controls of a condition add; None where none says anything now.

    Args:
        condition: with its control and states.
        x: x_t [B, C, h, w], without what the network sees beside it.
        t: times [B].
        added: pooled text and sizes, where the network is told them.
    """
    total: Residuals | None = None
    for hint in condition.control:
        low, high = torch.tensor(hint.window, dtype=t.dtype)
        rows = ((hint.scale.to(t) != 0) & (t > low) & (t <= high)).nonzero().flatten()
        if not len(rows):
            continue
        told = _of_rows(condition, hint, x, t, added, rows)
        total = told if total is None else total + told
    return total


def _of_rows(
    condition: Condition,
    hint: Hint,
    x: Tensor,
    t: Tensor,
    added: Mapping[str, Tensor] | None,
    rows: Tensor,
) -> Residuals:
    """What a hint adds, zeros in all but these rows."""
    states, mask = condition.states, condition.mask
    assert states is not None
    states = states.to(x)
    mask = None if mask is None else mask.to(x.device)
    if len(rows) == len(x):
        return hint.network(x, t, states, mask, added, hint)
    mask = None if mask is None else mask[rows]
    added = added and {name: value.to(x.device)[rows] for name, value in added.items()}
    there = rows.to(hint.scale.device)
    told = hint.network(x[rows], t[rows], states[rows], mask, added, hint.take(there))

    def spread(maps: Sequence[Tensor]) -> list[Tensor]:
        return [one.new_zeros(len(x), *one.shape[1:]).index_copy(0, rows, one) for one in maps]

    return Residuals(spread(told.skips), spread(told.levels))


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

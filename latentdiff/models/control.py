"""ControlNets and T2I-Adapters as nouns: what they add to the network that they stand beside."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentdiff.diffusion.condition import Condition, Hint, Residuals
from latentdiff.models.controlnet import ControlNet
from latentdiff.models.extension import Extension

if TYPE_CHECKING:
    from diffusers.models.adapter import T2IAdapter


_BRIGHTNESS = [[[0.299]], [[0.587]], [[0.114]]]


@dataclass(frozen=True, eq=False)
class ControlNetwork(Extension):
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

    def strengthened(self, factor: float) -> "ControlNetwork":
        """Another one, which says so many times as much."""
        module = copy.deepcopy(self.module)
        with torch.no_grad():
            for layer in (*module.controlnet_down_blocks, module.controlnet_mid_block):
                for parameter in layer.parameters():
                    parameter *= factor
        return replace(self, module=module)

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
class AdapterNetwork(Extension):
    """A T2I-Adapter that is loaded; threads may share it.

    Mou et al. 2023 (T2I-Adapter). What it says of a control picture knows neither x_t nor the text,
    and so it is computed once a run.

    Attributes:
        module: its weights.
        name: for people.
    """

    module: "T2IAdapter"
    name: str = "t2i-adapter"

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

"""Autoencoders of large pictures, tile by tile, with the answer of the whole at once.

An autoencoder of Stable Diffusion's kind is convolutions, which see a few pixels far; group norms,
whose mean and variance are those of a whole picture; and one attention, at the size of the latents,
where a large picture is small. So what lies at that size is computed at once. Of the rest, tiles
are computed with as much around them as their convolutions see, and the statistics of each norm
(Wu & He 2018, Group Normalization, eq. 2 and 7) are gathered over all tiles, one norm after the
other, before they are used. Nothing is blended: no seam can arise. Tiny autoencoders are
convolutions alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from latentdiff.models.tiny_autoencoder import TinyAutoencoder, TinyBlock

Tiling = Literal["auto", "on", "off"]

# Bytes of the activations of one layer of a whole picture, above which it is computed in tiles; and
# up to which what lies between two layers is kept, not computed anew for the next norm.
_LARGE = 2**30
_TILE = 384  # pixels along a side of what comes out of the finest level
_PLAIN = {"act_fn": "silu", "norm_type": "group"}
# Cells of its input that a unit looks at for so many cells around a cell of what it gives.
_REACH: dict[str, Callable[[int], int]] = {
    "block": lambda reach: reach + 2,
    "up": lambda reach: (reach + 1) // 2 + 1,
    "down": lambda reach: 2 * reach + 1,
    "norm": lambda reach: reach,
    "conv": lambda reach: reach + 1,
    "tiny": lambda reach: reach + 3,
}


def can_tile(module: Any) -> bool:
    """True of an autoencoder that is convolutions, group norms and an attention in the middle, or a
    tiny one."""
    if isinstance(module, TinyAutoencoder):
        return True
    config = module.config
    levels = len(config["block_out_channels"])
    return (
        levels > 1
        and list(config["down_block_types"]) == ["DownEncoderBlock2D"] * levels
        and list(config["up_block_types"]) == ["UpDecoderBlock2D"] * levels
        and all(config.get(key, value) == value for key, value in _PLAIN.items())
    )


def is_large(module: Any, pixels: int) -> bool:
    """True of pictures of so many pixels whose widest layer takes more than a GiB."""
    widest = max(module.config["block_out_channels"][:2])
    parameter = next(module.parameters())
    return pixels * widest * parameter.element_size() > _LARGE


def encode_tiled(module: Any, pictures: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] -> what the encoder says of them [B, 2C or C, h, w]."""
    encoder = module.encoder
    if isinstance(module, TinyAutoencoder):
        return _in_tiles(_tiny_units(module.encoder.layers), encoder.inward(pictures))
    fine = [_Unit("conv", encoder.conv_in), *_units(encoder.down_blocks, "downsamplers")]
    last = max(place for place, unit in enumerate(fine) if unit.kind == "down")
    x = _in_tiles(fine[: last + 1], pictures)
    for unit in fine[last + 1 :]:
        x = unit.whole(x)
    x = encoder.conv_out(silu(encoder.conv_norm_out(encoder.mid_block(x))))
    return x if module.quant_conv is None else module.quant_conv(x)


def decode_tiled(module: Any, latents: Tensor) -> Tensor:
    """The module's own latents [B, C, h, w] -> pictures [B, 3, H, W]."""
    if isinstance(module, TinyAutoencoder):
        inner = module.decoder
        return inner.outward(_in_tiles(_tiny_units(inner.layers), inner.inward(latents)))
    if hasattr(module, "quantize"):
        latents = module.quantize(latents)[0]
    if module.post_quant_conv is not None:
        latents = module.post_quant_conv(latents)
    decoder = module.decoder
    fine = _units(decoder.up_blocks, "upsamplers")
    fine += [_Unit("norm", decoder.conv_norm_out), _Unit("conv", decoder.conv_out)]
    first = next(place for place, unit in enumerate(fine) if unit.kind == "up")
    x = decoder.mid_block(decoder.conv_in(latents))
    for unit in fine[:first]:
        x = unit.whole(x)
    return _in_tiles(fine[first:], x)


@dataclass(frozen=True)
class _Unit:
    """A part of an autoencoder that is done before the next begins.

    Attributes:
        kind: a residual block, a change of size, a norm with its activation, a convolution, or a
            block of a tiny autoencoder.
        module: the part.
        statistics: mean and mean square [B, groups] of each of its norms, as far as they are known.
    """

    kind: Literal["block", "up", "down", "norm", "conv", "tiny"]
    module: Any
    statistics: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def norms(self) -> list[nn.GroupNorm]:
        if self.kind == "block":
            return [self.module.norm1, self.module.norm2]
        return [self.module] if self.kind == "norm" else []

    def whole(self, x: Tensor) -> Tensor:
        """A residual block or a change of size, of all of x."""
        return self.module(x, None) if self.kind == "block" else self.module(x)

    def before_norm(self, x: Tensor) -> Tensor:
        """What the first norm whose statistics are not known sees of x."""
        if self.statistics:
            return self.module.conv1(self._normed(0, x))
        return x

    def __call__(self, x: Tensor) -> Tensor:
        """The unit, with its statistics."""
        if self.kind == "norm":
            return self._normed(0, x)
        if self.kind != "block":
            return self.module(x)
        h = self.module.conv1(self._normed(0, x))
        h = self.module.conv2(self._normed(1, h))
        shortcut = self.module.conv_shortcut
        return h.add_(x if shortcut is None else shortcut(x))

    def _normed(self, number: int, x: Tensor) -> Tensor:
        norm = self.norms[number]
        mean, square = self.statistics[number]
        each = x.shape[1] // norm.num_groups
        rate = (square - mean.square() + norm.eps).rsqrt().repeat_interleave(each, 1)
        gain = rate * norm.weight.double()
        offset = norm.bias.double() - mean.repeat_interleave(each, 1) * gain
        gain, offset = (part.float()[:, :, None, None] for part in (gain, offset))
        return silu(torch.addcmul(offset, x.float(), gain)).to(x.dtype)


def _units(blocks: Sequence[Any], change: Literal["upsamplers", "downsamplers"]) -> list[_Unit]:
    units: list[_Unit] = []
    for block in blocks:
        units += [_Unit("block", resnet) for resnet in block.resnets]
        samplers = getattr(block, change, None) or ()
        units += [_Unit("up" if change == "upsamplers" else "down", each) for each in samplers]
    return units


def _tiny_units(layers: nn.Sequential) -> list[_Unit]:
    """The layers of a tiny autoencoder, but for what is done to single values, which is with the
    convolution before it."""
    units: list[_Unit] = []
    for layer in layers:
        if isinstance(layer, TinyBlock):
            units.append(_Unit("tiny", layer))
        elif isinstance(layer, nn.Upsample):
            units.append(_Unit("up", layer))
        elif isinstance(layer, nn.Conv2d):
            units.append(_Unit("conv" if layer.stride == (1, 1) else "down", layer))
        else:
            units[-1] = _Unit("conv", nn.Sequential(units[-1].module, layer))
    return units


def _in_tiles(units: Sequence[_Unit], x: Tensor) -> Tensor:
    """The units one after the other on x [B, C, H, W]; what one gives is kept where it is small."""
    start = 0
    for place, unit in enumerate(units):
        for _ in unit.norms:
            reach = 1 if unit.statistics else 0
            unit.statistics.append(_moments(x, units[start:place], unit, reach))
        if place == len(units) - 1 or _bytes_after(units[start : place + 1], x) <= _LARGE:
            x, start = _joined(x, units[start : place + 1]), place + 1
    return x


def _moments(x: Tensor, units: Sequence[_Unit], unit: _Unit, reach: int) -> tuple[Tensor, Tensor]:
    """Mean and mean square [B, groups] in float64 of what the next norm of a unit sees."""
    groups = unit.norms[0].num_groups
    mean, square, cells = torch.zeros(()), torch.zeros(()), 0
    for tile, _ in _tiles(x, units, reach, unit.before_norm):
        values = tile.float().unflatten(1, (groups, -1)).flatten(2)
        part = torch.var_mean(values, 2, correction=0)
        variance, middle = (each.double() for each in part)
        count = tile.shape[2] * tile.shape[3]
        cells += count
        mean = mean + count * middle
        square = square + count * (variance + middle.square())
    return mean / cells, square / cells


def _joined(x: Tensor, units: Sequence[_Unit]) -> Tensor:
    """The whole of what the units give for x."""
    whole: Tensor | None = None
    for tile, (top, left, height, width) in _tiles(x, units, 0, _unchanged):
        if whole is None:
            whole = tile.new_empty(*tile.shape[:2], height, width)
        whole[..., top : top + tile.shape[2], left : left + tile.shape[3]] = tile
    assert whole is not None
    return whole


def _tiles(
    x: Tensor, units: Sequence[_Unit], reach: int, seen: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, tuple[int, int, int, int]]]:
    """What is seen of x behind the units, tile by tile, with its place in the whole and the whole's
    size.

    Every tile is computed in a window of one size, so that packed weights serve all.

    Args:
        x: [B, C, H, W].
        units: what comes before.
        reach: cells that `seen` looks at around each.
        seen: of what the units give.
    """
    kinds = [unit.kind for unit in units]
    up, down = 2 ** kinds.count("up"), 2 ** kinds.count("down")
    for kind in reversed(kinds):
        reach = _REACH[kind](reach)
    margin = -(-reach // down)
    side = _TILE // max(up, down)
    size = x.shape[2] // down, x.shape[3] // down
    window = [min(side + 2 * margin, length) for length in size]
    for top in range(0, size[0], side):
        for left in range(0, size[1], side):
            corner = top, left
            first = [
                min(max(corner[axis] - margin, 0), size[axis] - window[axis]) for axis in (0, 1)
            ]
            rows, columns = (
                slice(first[axis] * down, (first[axis] + window[axis]) * down) for axis in (0, 1)
            )
            part = x[..., rows, columns]
            for unit in units:
                part = unit(part)
            part = seen(part)
            begin = [(corner[axis] - first[axis]) * up for axis in (0, 1)]
            length = [min(side, size[axis] - corner[axis]) * up for axis in (0, 1)]
            core = part[..., begin[0] : begin[0] + length[0], begin[1] : begin[1] + length[1]]
            yield core, (top * up, left * up, size[0] * up, size[1] * up)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _bytes_after(units: Sequence[_Unit], x: Tensor) -> float:
    """Size of what the units give for x."""
    values, channels = float(x[:, 0].numel()), x.shape[1]
    for unit in units:
        values *= {"up": 4.0, "down": 0.25}.get(unit.kind, 1.0)
        if unit.kind == "block":
            channels = unit.module.norm2.num_channels
        elif unit.kind == "tiny":
            channels = len(unit.module.conv[0].bias)
        elif unit.kind == "conv" and getattr(unit.module, "bias", None) is not None:
            channels = len(unit.module.bias)
    return values * channels * x.element_size()

"""Layers with weights packed into the layout that oneDNN computes with, and networks of them."""

import weakref
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from latentdiff.memory import let_go_of_pages
from latentdiff.models.attention import (
    AttentionLayer,
    Shown,
    auto,
    by_heads,
    explicit,
    fused,
    sdpa,
    with_shown,
    xformers,
)
from latentdiff.models.blocks import GEGLU, ResnetBlock2D, Upsample
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.models.engines.state import merged
from latentdiff.models.engines.winograd import pays, transformed, winograd

# Weights of a linear layer in float32 up to which BLAS multiplies faster: on a CPU of AMD's with
# AVX-512, where beyond oneDNN takes 0.6 to 0.9 of its time, and on one of Intel's with AMX.
_SMALL, _SMALL_WITH_AMX = 2**16, 2**18
# Places of a map and channels of a group up to which a norm of bfloat16 pays in float32.
_FEW, _NARROW = 1024, 20
# Weights of queries, keys and values up to which a layer holds them joined, too.
_JOINED = 2**18
# Shapes that a convolution keeps packed weights for, beside those of tapes: of a run that is guided
# in part of its steps.
_SHAPES = 2


class _Packed(nn.Module):
    """A layer that a copy of its network shares: it never changes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class PackedConv(_Packed):
    """A convolution of channels-last maps, whose weights are packed for the shapes that it meets.

    oneDNN's layout depends on the shape; another one's is unpacked at every call, slowly. Where it
    pays the convolution is Winograd's, whose weights are of any shape.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.settings = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.weight, self.bias = conv.weight, conv.bias
        self._packed: dict[torch.Size | None, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        minimal = self.minimal(x.shape)
        key = None if minimal else x.shape
        packed = self._packed.get(key)
        if packed is None:
            pack = torch.ops.mkldnn._reorder_convolution_weight
            kernel = self.kernel()
            packed = transformed(kernel) if minimal else pack(kernel, *self.settings, x.shape)
            let_go_of_pages(self.weight.data_ptr(), self.weight.nbytes)
            others = list(self._packed.items())[1 - _SHAPES :]
            self._packed = dict([*others, (key, packed)])  # at once, for other threads' sake
        x = x.contiguous(memory_format=torch.channels_last)
        if minimal:
            return winograd(x, packed, self.bias)
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, packed, self.bias, *self.settings, "none", [], "")

    def kernel(self) -> Tensor:
        """The weights, as they are packed."""
        return self.weight.detach()

    def minimal(self, shape: torch.Size) -> bool:
        """True for maps of which Winograd's convolution takes less time."""
        return pays(self.settings, self.weight, shape)


class _Quarters(PackedConv):
    """A 3 x 3 convolution of what is twice as large by repetition, on what is repeated.

    Each pixel that is repeated becomes four, and each of these sees 2 x 2 of them: four kernels of
    2 x 2, with 4 products where the convolution has 9. A sum of weights is rounded once more.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        if conv.bias is not None:
            self.bias = nn.Parameter(conv.bias.detach().repeat(4), requires_grad=False)

    def minimal(self, shape: torch.Size) -> bool:
        return False

    def kernel(self) -> Tensor:
        """[4 O, C, 2, 2]: of upper left, upper right, lower left and lower right pixels."""
        whole = self.weight.detach().float()
        return torch.cat([half for row in _halves(whole, 2) for half in _halves(row, 3)]).to(
            self.weight.dtype
        )


def _halves(kernel: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """A kernel of three along an axis as kernels of two, of even and of odd places."""
    a, b, c = kernel.unbind(axis)
    return torch.stack([a, b + c], axis), torch.stack([a + b, c], axis)


class PackedUpsample(_Packed):
    """See `latentdiff.models.blocks.Upsample`."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.quarters = PackedConv(conv), _Quarters(conv)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        count, _, height, width = x.shape
        if size not in (None, (2 * height, 2 * width)):
            return self.conv(interpolate(x, size=size, mode="nearest"))
        # Place (i + a, j + b) of quarter (a, b) is pixel (2 i + a, 2 j + b).
        quarters = self.quarters(x).permute(0, 2, 3, 1).contiguous()
        image, row, place, _ = quarters.stride()
        channels = place // 4
        shape = count, height, 2, width, 2, channels
        strides = image, row, row + 2 * channels, place, place + channels, 1
        pixels = quarters.as_strided(shape, strides)
        return pixels.reshape(count, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class PackedLinear(_Packed):
    """A linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        pack = torch.ops.mkldnn._reorder_linear_weight
        self.register_buffer("weight", pack(layer.weight.detach()))
        let_go_of_pages(layer.weight.data_ptr(), layer.weight.nbytes)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class SmallLinear(_Packed):
    """A linear layer that BLAS computes, with its weights [inside, outside] as they are read."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach().t().contiguous())
        let_go_of_pages(layer.weight.data_ptr(), layer.weight.nbytes)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, weight = x.reshape(-1, x.shape[-1]), self.get_buffer("weight")
        y = torch.mm(rows, weight) if self.bias is None else torch.addmm(self.bias, rows, weight)
        return y.view(*x.shape[:-1], -1)


class Pointwise(nn.Module):
    """A 1 x 1 convolution, which is a linear layer over the channels."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        layer: Any = nn.Linear(conv.in_channels, conv.out_channels, device="meta")
        layer.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
        layer.bias = conv.bias
        self.layer = _packed_linear(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Part(nn.Module):
    """The columns of one residual block in the output of the merged time projection."""

    def __init__(self, start: int, width: int) -> None:
        super().__init__()
        self.start, self.width = start, width

    def forward(self, time: Tensor) -> Tensor:
        return time.narrow(1, self.start, self.width)


class PackedGEGLU(_Packed):
    """See `latentdiff.models.blocks.GEGLU`; its activation is computed as the gate comes out."""

    def __init__(self, proj: nn.Linear) -> None:
        super().__init__()
        pack = torch.ops.mkldnn._reorder_linear_weight
        value, gate = proj.weight.detach().chunk(2)
        self.register_buffer("value", pack(value))
        self.register_buffer("gate", pack(gate))
        let_go_of_pages(proj.weight.data_ptr(), proj.weight.nbytes)
        self.biases = proj.bias.detach().chunk(2)

    def forward(self, x: Tensor) -> Tensor:
        project = torch.ops.mkldnn._linear_pointwise
        gate = project(x, self.gate, self.biases[1], "gelu", [], "none")
        return project(x, self.value, self.biases[0], "none", [], "").mul_(gate)


class PackedNorm(nn.GroupNorm):
    """A group norm of bfloat16, with parameters in float32.

    Of few places and narrow groups torch's own takes up to five times as long in bfloat16.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias = (
            nn.Parameter(each.detach().float(), requires_grad=False)
            for each in (norm.weight, norm.bias)
        )

    def forward(self, input: Tensor) -> Tensor:
        narrow = self.num_channels <= _NARROW * self.num_groups
        if narrow and input.shape[2:].numel() < _FEW:
            return super().forward(input.float()).to(input.dtype)
        return super().forward(input)


class PackedResnet(ResnetBlock2D):
    """A residual block that changes in place what nobody else sees."""

    def __init__(self, block: ResnetBlock2D) -> None:
        nn.Module.__init__(self)
        self.__dict__ |= {**block.__dict__, "_modules": dict(block._modules)}

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(silu(self.norm1(x), inplace=True))
        if time is not None:
            h.add_(self.time_emb_proj(time)[:, :, None, None])
        h = self.conv2(silu(self.norm2(h), inplace=True))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


def _packed_linear(layer: nn.Linear) -> nn.Module:
    most = _SMALL_WITH_AMX if torch.cpu._is_amx_tile_supported() else _SMALL
    small = layer.weight.numel() <= most and layer.weight.dtype == torch.float32
    return SmallLinear(layer) if small else PackedLinear(layer)


class SelfAttention:
    """An attention processor that computes queries, keys and values of a small layer at once.

    Those are taken apart where a processor around it asks the layer for some.
    """

    def __init__(self, attn: AttentionLayer) -> None:
        parts = attn.to_q, attn.to_k, attn.to_v
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        layer: Any = nn.Linear(attn.width, 3 * attn.width, device="meta")
        weights = torch.cat([part.weight.detach() for part in parts])
        layer.weight = nn.Parameter(weights, requires_grad=False)
        layer.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self._layer = _packed_linear(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # see `CrossAttention`

    def __call__(
        self,
        attn: Any,
        x: Tensor,
        states: Tensor | None = None,
        mask: Tensor | None = None,
        shown: Shown = (),
    ) -> Tensor:
        """See `latentdiff.models.attention.sdpa`."""
        q, k, v = self._layer(x).unflatten(2, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
        return attn.to_out[0](fused(attn, q, k, v, mask).transpose(1, 2).flatten(2))


class CrossAttention:
    """An attention processor that computes keys and values of the same states once.

    They go when the states go.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a perturbed copy of the layer has the same weights

    def __call__(
        self,
        attn: Any,
        x: Tensor,
        states: Tensor | None = None,
        mask: Tensor | None = None,
        shown: Shown = (),
    ) -> Tensor:
        """See `latentdiff.models.attention.sdpa`."""
        assert states is not None
        q = by_heads(attn, attn.to_q(x))
        k, v = self._keys_and_values(attn, states)
        mixed = with_shown(fused, attn, q, fused(attn, q, k, v, mask), shown)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))

    def _keys_and_values(self, attn: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        key = id(states), 0 if states.is_inference() else states._version
        if key not in self._known:
            k, v = (
                by_heads(attn, project(states)).contiguous() for project in (attn.to_k, attn.to_v)
            )
            self._known[key] = k, v
            weakref.finalize(states, self._known.pop, key, None)
            return k, v
        return self._known[key]


def packed(module: nn.Module) -> nn.Module:
    """The twin of a network with packed layers in place of its own."""
    twin = merged(module)
    if isinstance(twin, CrossAttentionUNet):
        _join_time(twin)
    for name, layer in list(twin.named_modules()):
        parent, _, last = name.rpartition(".")
        new: nn.Module | None = None
        if isinstance(twin.get_submodule(parent), _Packed):
            continue  # it has its layer already
        if isinstance(layer, nn.Conv2d):
            new = Pointwise(layer) if layer.kernel_size == (1, 1) else PackedConv(layer)
        elif isinstance(layer, GEGLU):
            new = PackedGEGLU(layer.proj)
        elif isinstance(layer, ResnetBlock2D):
            new = PackedResnet(layer)
        elif isinstance(layer, nn.GroupNorm) and layer.weight.dtype == torch.bfloat16:
            new = PackedNorm(layer)
        elif isinstance(layer, Upsample):
            new = PackedUpsample(layer.conv)
        elif isinstance(layer, nn.Linear) and not name.startswith("time_"):
            new = _packed_linear(layer)
        elif isinstance(layer, AttentionLayer) and layer.processor in (auto, sdpa):
            if layer.is_cross_attention:
                layer.processor = CrossAttention()
            elif 3 * layer.width**2 <= _JOINED:
                layer.processor = SelfAttention(layer)
        if new is not None:
            setattr(twin.get_submodule(parent), last, new)
    return twin


def replayable(twin: nn.Module) -> bool:
    """True where attention is of processors that keep no count of their calls."""
    layers = (part for part in twin.modules() if isinstance(part, AttentionLayer))
    ours = SelfAttention | CrossAttention
    return all(
        isinstance(layer.processor, ours) or layer.processor in (auto, sdpa, explicit, xformers)
        for layer in layers
    )


def _join_time(unet: CrossAttentionUNet) -> None:
    """Merge the time projections of all residual blocks into one linear layer."""
    blocks = [block for block in unet.modules() if isinstance(block, ResnetBlock2D)]
    layers: list[Any] = [block.time_emb_proj for block in blocks]
    whole: Any = unet
    joined = nn.Linear(1, 1, device="meta")
    for kind in ("weight", "bias"):
        value = torch.cat([getattr(layer, kind).detach() for layer in layers])
        setattr(joined, kind, nn.Parameter(value, requires_grad=False))
    whole.time_act = nn.Sequential(nn.SiLU(), joined)
    start = 0
    block: Any
    for block, layer in zip(blocks, layers, strict=True):
        block.time_emb_proj = Part(start, layer.out_features)
        start += layer.out_features

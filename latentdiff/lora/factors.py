"""The low-rank factors of a LoRA: two thin matrices for each module that it changes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.errors import UserError

Part = Literal["unet", "transformer", "text_encoder", "text_encoder_2"]
PARTS: tuple[Part, ...] = get_args(Part)

MAX_RANK = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """W + scale * (alpha / rank) * up @ down: Hu et al. 2021, eq. 3 and sec. 4.1.

    Attributes:
        down: [rank, in] for a linear layer, [rank, in, k, k] for a convolution.
        up: [out, rank], or [out, rank, 1, 1].
        alpha: the strength it was trained with.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)


class Change(Protocol):
    """A change of a weight [out, in] or [out, in, k, k]: see `latentdiff.lora.changes`."""

    def of(self, weight: Tensor) -> Tensor:
        """The change at strength 1, float32 [out, in, ...]."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the ends of their names in LyCORIS' files."""
        ...


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA as it is in a file, with the model's own names of modules.

    Attributes:
        unet: factors by module of the U-Net.
        text_encoder: factors by module of the text encoder.
        metadata: the metadata in the file's header.
        sums: changes of norms and biases, W + scale * change, by part and name of the parameter.
        words: learned words that are packed into the file, and are no part of the LoRA.
        text_encoder_2: factors by module of the second text encoder.
        ldm: latent-diffusion's names of the U-Net's layers, where kohya's layout has them: of
            Stable Diffusion XL.
        changes: changes of weights that are no plain product (LoHa, LoKr, DoRA), by part and layer.
        transformer: factors by module of the transformer that some models have for a U-Net.
    """

    unet: Mapping[str, Factors] = field(default_factory=dict)
    text_encoder: Mapping[str, Factors] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    words: Sequence[str] = ()
    sums: Mapping[Part, Mapping[str, Tensor]] = field(default_factory=dict)
    text_encoder_2: Mapping[str, Factors] = field(default_factory=dict)
    ldm: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[Part, Mapping[str, Change]] = field(default_factory=dict)
    transformer: Mapping[str, Factors] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[Part, Mapping[str, Factors]]]:
        """The parts of the model that it changes."""
        for part in PARTS:
            if factors := getattr(self, part):
                yield part, factors


def parts_of(bundle: Bundle) -> list[Part]:
    """The parts of a model that a LoRA can change."""
    return [part for part in PARTS if part in bundle.modules]


def network(bundle: Bundle, part: Part) -> nn.Module:
    """The network that a part names."""
    return bundle.modules[part]


def layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that a LoRA can change, by name; seen through any LoRA that is attached."""
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    wrapped: str | None = None
    for name, module in model.named_modules():
        if wrapped is not None and name.startswith(wrapped):
            continue
        base = getattr(module, "base_layer", module)
        if base is not module:
            wrapped = f"{name}."
        if isinstance(base, nn.Linear | nn.Conv2d) and getattr(base, "groups", 1) == 1:
            found[name] = base
    return found


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of a network that have weights, by name."""
    kinds = (nn.GroupNorm, nn.LayerNorm)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module.weight is not None
    }


def fitting_sum(name: str, change: Tensor, layer: nn.Module, end: str) -> Tensor:
    """Reshape a change to the parameter that it is added to.

    Args:
        name: of the change, for messages.
        layer: has the parameter that is called `end`.

    Raises:
        UserError: there is no such parameter, or it has another shape.
    """
    parameter = getattr(layer, end, None)
    if parameter is None:
        raise UserError(f"{name}: this layer has no {end}; the LoRA was made for another model.")
    if parameter.numel() != change.numel():
        raise UserError(
            f"{name} should be {list(parameter.shape)}, but is {list(change.shape)}; "
            "the LoRA was made for another model."
        )
    return change.reshape(parameter.shape)


def fitting(name: str, factors: Factors, layer: nn.Linear | nn.Conv2d) -> Factors:
    """Reshape factors to the layer that they change, which may be a matrix or a 1 x 1 convolution.

    Raises:
        UserError: they are of another layer, or their numbers make no sense.
    """
    down, up, rank = factors.down, factors.up, factors.rank
    outside, inside, *kernel = layer.weight.shape
    wanted = (rank, inside, *kernel), (outside, rank, *([1] * len(kernel)))
    for factor, shape in zip((down, up), wanted, strict=True):
        if _bare(factor.shape) != _bare(shape):
            raise UserError(
                f"{name} should be {list(shape)}, but is {list(factor.shape)}; "
                "the LoRA was made for another model."
            )
    if not 1 <= rank <= MAX_RANK:
        raise UserError(f"{name}: rank {rank} is not 1 .. {MAX_RANK}.")
    return Factors(down.reshape(wanted[0]), up.reshape(wanted[1]), factors.alpha)


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the ones at its end after the first two."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)

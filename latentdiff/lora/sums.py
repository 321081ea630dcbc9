"""Changes that a LoRA file adds to norms and biases, which are too small to have factors, those of
weights that are no plain product (LoHa, LoKr, DoRA), and on a CPU those that are.

The parameter keeps its place; its values are those of the model plus those of every LoRA at its
scale, and the model's own come back when the last one goes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.lora.factors import Change

ATTRIBUTE = "lora_sums"


@dataclass(slots=True, eq=False)
class Sums:
    """The changes that LoRAs add to parameters of a network.

    Attributes:
        plain: the model's own values, by parameter.
        added: the changes of each LoRA, by parameter.
        scales: the strength of each LoRA.
    """

    plain: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Mapping[str, Tensor | Change]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)


def sums_of(model: nn.Module) -> Sums:
    """The changes added to a network; empty if no LoRA adds any."""
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, Sums) else Sums()


def add(model: nn.Module, name: str, changes: Mapping[str, Tensor | Change]) -> None:
    """Put the changes of a LoRA beside those that are there, at scale 0."""
    sums = sums_of(model)
    for parameter in changes:
        sums.plain.setdefault(parameter, _parameter(model, parameter).data)
    sums.added[name], sums.scales[name] = changes, 0.0
    setattr(model, ATTRIBUTE, sums)


def scale(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Set the strength of those that are named; what they do not change stays as it is.

    Raises:
        UserError: a sum is not finite; nothing is changed.
    """
    sums = sums_of(model)
    now = sums.scales | {name: scales[name] for name in sums.scales.keys() & scales.keys()}
    moved = [name for name, value in now.items() if value != sums.scales[name]]
    values = {name: _sum(sums, name, now) for lora in moved for name in sums.added[lora]}
    sums.scales = now
    for name, value in values.items():
        _parameter(model, name).data = value


def _sum(sums: Sums, name: str, scales: Mapping[str, float]) -> Tensor:
    """The values of a parameter, in whatever order LoRAs were put in.

    Raises:
        UserError: they are not finite.
    """
    plain = sums.plain[name]
    used = [lora for lora in sorted(sums.added) if name in sums.added[lora] and scales[lora]]
    if not used:
        return plain
    value = plain.float()
    for lora in used:
        change = sums.added[lora][name]
        change = change if isinstance(change, Tensor) else change.of(plain)
        value = value + scales[lora] * change.to(plain.device).float()
    value = value.to(plain.dtype)
    if not bool(value.isfinite().all()):
        module = name.removesuffix(".weight")
        raise UserError(f"{module}: with its LoRA it is not finite.")
    return value


def remove(model: nn.Module, name: str) -> None:
    """Take a LoRA out; after the last one the parameters have the model's own values."""
    sums = sums_of(model)
    if name not in sums.added:
        return
    scale(model, {name: 0.0})
    del sums.added[name], sums.scales[name]
    kept = {parameter for changes in sums.added.values() for parameter in changes}
    sums.plain = {parameter: sums.plain[parameter] for parameter in kept}
    if not sums.added:
        delattr(model, ATTRIBUTE)


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    """A parameter by its own name, seen through a layer that peft put around its module."""
    module, _, last = name.rpartition(".")
    layer = model.get_submodule(module)
    return getattr(getattr(layer, "base_layer", layer), last)

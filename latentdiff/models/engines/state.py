"""Checks that a network is one for engines, still what one was made of, and computes the same."""

import copy
import math
from collections.abc import Callable
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import warn
from latentdiff.models.attention import AttentionLayer
from latentdiff.models.cross_attention_unet import CrossAttentionUNet, EnergyUNet
from latentdiff.models.kl_autoencoder import KLAutoencoder

# The largest difference to the network itself, relative to its output; more is a fault.
_WITHIN = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

_VERSION, _DTYPE = attrgetter("_version"), attrgetter("dtype")


def state_of(module: nn.Module) -> list[object]:
    """What a network's answers depend on, to be compared with what it is later.

    Changes are seen by the tensors' own count of them, which those through `.data` pass by. Ids
    and addresses mean something only as long as `tensors_of` the network are held.
    """
    parts = [module]
    for part in parts:  # which grows; three times as fast as `module.modules()`, at every call
        parts += filter(None, part._modules.values())
    every = chain.from_iterable(part._parameters.values() for part in parts)
    tensors = [each for each in every if each is not None]
    try:
        versions = list(map(_VERSION, tensors))
    except RuntimeError:  # tensors of inference have no count
        versions = [0 if each.is_inference() else each._version for each in tensors]
    pointers, dtypes = list(map(Tensor.data_ptr, tensors)), list(map(_DTYPE, tensors))
    state: list[object] = [list(map(id, tensors)), versions, pointers, dtypes]
    for part in parts:
        if isinstance(part, AttentionLayer):
            state.append(part.processor)
        elif is_adapted(part):
            adapters: Any = part
            state.append((dict(adapters.scaling), list(adapters.active_adapters)))
            state.append((adapters.disable_adapters, list(adapters.merged_adapters)))
    return state


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters of a network, and their memory as it now is: no other gets their ids."""
    return [each for p in module.parameters() for each in (p, p.detach())]


def cannot_compute(module: nn.Module) -> str | None:
    """The reason why no engine of ours computes a network; None where some may."""
    if next(module.parameters()).device.type != "cpu":
        return "it computes on a CPU alone"
    if not isinstance(module, CrossAttentionUNet | KLAutoencoder):
        return f"it does not know networks such as this {type(module).__name__}"
    if isinstance(module, EnergyUNet):
        return "an energy is computed with its gradient"
    return None


def is_adapted(part: nn.Module) -> bool:
    """True for a layer with adapters of peft; to ask the object itself takes ten times longer."""
    return _has_base(type(part))


@cache
def _has_base(kind: type) -> bool:
    return hasattr(kind, "get_base_layer")


def merged(module: nn.Module) -> nn.Module:
    """Modules of the same tensors, but for layers with adapters of peft, which are merged."""
    if is_adapted(module):
        shared: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
        adapters: Any = copy.deepcopy(module, shared)
        base = adapters.get_base_layer()
        for kind in ("weight", "bias"):
            if (value := getattr(base, kind)) is not None:
                setattr(base, kind, nn.Parameter(value.detach().clone(), requires_grad=False))
        if not adapters.disable_adapters:
            adapters.merge(safe_merge=True)
        return base
    twin = type(module).__new__(type(module))  # much faster than a deep copy
    parts = {name: part and merged(part) for name, part in module._modules.items()}
    own = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}
    twin.__dict__ = {**module.__dict__, **own, "_modules": parts}
    return twin


class Checks:
    """Comparisons of an engine with the network itself, each made once.

    Args:
        module: the network.
        told: what is not used where they differ, as "packed weights are not used".
    """

    def __init__(self, module: nn.Module, told: str) -> None:
        self._module, self._told = module, told
        self._passed: dict[str, bool] = {}

    def failed(self) -> bool:
        """True once something was found to differ."""
        return not all(self._passed.values())

    def passes(self, what: str, fast: Callable[[], Tensor], slow: Callable[[], Tensor]) -> bool:
        """Tell whether the engine gives what the network gives; computed once of each kind.

        Args:
            what: the kind.
            fast: gives the answer of the engine.
            slow: gives that of the network.
        """
        if what not in self._passed:
            self._first(what, fast, slow)
        return self._passed[what]

    def answer(self, what: str, fast: Callable[[], Tensor], slow: Callable[[], Tensor]) -> Tensor:
        """The answer of the engine, or the network's own where they differ: see `passes`.

        The first takes one call of each, every other one call.
        """
        if what not in self._passed:
            return self._first(what, fast, slow)
        return fast() if self._passed[what] else slow()

    def _first(self, what: str, fast: Callable[[], Tensor], slow: Callable[[], Tensor]) -> Tensor:
        """The first answer of a kind."""
        wanted = given = slow()
        try:
            given = fast()
            largest = wanted.abs().max().clamp(min=1e-12)
            difference = float((given - wanted).abs().max() / largest)
            fault = f"they compute something else, by {difference:.1g} of the largest value"
        except RuntimeError as error:  # what oneDNN lacks for a processor, or memory
            difference, fault = math.inf, str(error).partition("\n")[0]
        self._passed[what] = difference <= _WITHIN[next(self._module.parameters()).dtype]
        if not self._passed[what]:
            warn(f"{self._told} on this machine: {fault}")
        return given if self._passed[what] else wanted

"""Checks that a network is one for engines, still what one was made of, and computes the same."""

import copy
import math
from collections.abc import Callable
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


class Watched:
    """A network, looked over at every call for what its answers depend on.

    In-place changes are seen by the tensors' own count of them, which those through `.data` pass
    by. All that was there at the last look is held, so that nothing else gets its id or memory.

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.forget()

    def forget(self) -> None:
        """Let go of all that is held; the next look finds a change."""
        self._parts: list[nn.Module] = []
        self._branches: list[dict[str, nn.Module | None]] = []
        self._leaves: list[dict[str, nn.Parameter | None]] = []
        self._attending: list[AttentionLayer] = []
        self._adapted: list[Any] = []
        self._held: list[Tensor] = []
        self._facts: list[object] | None = None

    def changed(self) -> bool:
        """True where the network is another than at the last look, and at the first."""
        if self._facts is not None and self._look() == self._facts:
            return False
        self._parts = [self._module]
        for part in self._parts:  # which grows
            self._parts += filter(None, part._modules.values())
        self._branches = [part._modules for part in self._parts]
        self._leaves = [part._parameters for part in self._parts]
        self._attending = [part for part in self._parts if isinstance(part, AttentionLayer)]
        self._adapted = [part for part in self._parts if is_adapted(part)]
        self._facts = self._look()
        # A tensor may get other memory: what it has now is held beside it.
        self._held = [each for p in self._tensors() for each in (p, p.detach())]
        return True

    def _tensors(self) -> list[Tensor]:
        every = chain.from_iterable(map(dict.values, self._leaves))
        return [each for each in every if each is not None]

    def _look(self) -> list[object]:
        """What the answers depend on: without a loop in Python, some hundreds of parts long."""
        branches = chain.from_iterable(map(dict.values, self._branches))
        tensors = self._tensors()
        try:
            versions = list(map(_VERSION, tensors))
        except RuntimeError:  # tensors of inference have no count
            versions = [0 if each.is_inference() else each._version for each in tensors]
        return [
            list(map(id, branches)),
            list(map(id, tensors)),
            versions,
            list(map(Tensor.data_ptr, tensors)),
            list(map(_DTYPE, tensors)),
            [layer.processor for layer in self._attending],
            [(dict(each.scaling), list(each.active_adapters)) for each in self._adapted],
            [(each.disable_adapters, list(each.merged_adapters)) for each in self._adapted],
        ]


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
    return hasattr(type(part), "get_base_layer")


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

"""Networks as native code: a library for each shape of a call, made by `latentdiff compile`.

Whatever no library was made for is left to the engine inside.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from latentdiff.diffusion.condition import Condition
from latentdiff.errors import warn
from latentdiff.models.autoencoder import Autoencoder, DiffusersAutoencoder
from latentdiff.models.cross_attention_unet import CrossAttentionUNet, EnergyUNet
from latentdiff.models.engines.around import AroundAutoencoder, AroundNetwork
from latentdiff.models.engines.packages import (
    cache_folder,
    call_key,
    distrust,
    network_key,
    packages,
    weights_key,
)
from latentdiff.models.engines.state import Checks, is_adapted, state_of, tensors_of
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.network import Network
from latentdiff.models.perturbation import Perturbation
from latentdiff.models.tiling import is_large

# torch's own loader of it imports the compiler, which takes a second.
_Runner: Any = torch._C._aoti.AOTIModelContainerRunnerCpu  # pyright: ignore[reportAttributeAccessIssue]


class Missing(Exception):
    """There is no compiled code for a call."""


class Call:
    """The arguments of a call of a network.

    Attributes:
        tensors: all tensors among them, contiguous, as compiled code takes them.

    Raises:
        Missing: something else is among them, as a perturbation of the attention.
    """

    def __init__(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = {key: value for key, value in kwargs.items() if value is not None}
        leaves, self._spec = tree_flatten((args, given))
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise Missing
        self.tensors: list[Tensor] = [leaf.contiguous() for leaf in leaves]

    def __str__(self) -> str:
        return ", ".join(" x ".join(map(str, t.shape)) or "1" for t in self.tensors)

    @property
    def key(self) -> str:
        """See `call_key`."""
        return call_key(str(self._spec), self.tensors)

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with tensors in place of its own."""
        return tree_unflatten(list(tensors), self._spec)


Maker = Callable[[Callable[..., Tensor], Call, str], None]
"""Compiles what is called, with its arguments, and keeps the package under a name."""


def cannot_compile(module: nn.Module) -> str | None:
    """The reason why a network has no compiled code here; None where it may have."""
    parameter = next(module.parameters())
    if parameter.device.type != "cpu":
        return "it computes on a CPU alone"
    if not isinstance(module, CrossAttentionUNet | KLAutoencoder):
        return f"it does not know networks such as this {type(module).__name__}"
    if isinstance(module, EnergyUNet):
        return "an energy is computed with its gradient"
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        return f"it does not compute in {str(parameter.dtype).removeprefix('torch.')}"
    return None


def can_compile(autoencoder: Autoencoder) -> TypeGuard[DiffusersAutoencoder]:
    """True for an autoencoder whose decoder may have compiled code; not in tiles, of any size."""
    known = isinstance(autoencoder, DiffusersAutoencoder) and autoencoder.tiling != "on"
    return known and not cannot_compile(autoencoder.module)


class Compiled:
    """A method of a network, called through its packages.

    Args:
        module: the network.
        what: the name of the method.
        make: makes a package where there is none; None: such calls are `Missing`.
        tells: whether the first such call warns.
    """

    def __init__(
        self, module: nn.Module, what: str, make: Maker | None = None, *, tells: bool = False
    ) -> None:
        self._module, self._what, self._make, self._tells = module, what, make, tells
        self._lock = threading.Lock()
        self._state: list[object] = []
        self._held: list[Tensor] = []
        self._name: str | None = None  # of its packages, up to the call
        self._runners: dict[str, Any] = {}

    def at_hand(self) -> bool:
        """True where there are packages of the network with its weights as they are."""
        known = packages(network_key(self._module, self._what))
        if known:  # else its weights, which take long to read, need no name
            with self._lock:
                self._look()
        return self._name is not None and any(each.startswith(self._name) for each in known)

    @property
    def used(self) -> bool:
        """True once a package has run."""
        return any(runner is not None for runner in self._runners.values())

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        call = Call(args, kwargs)
        key = call.key
        with self._lock:
            self._look()
            if key not in self._runners:
                self._runners[key] = self._open(call)
            runner = self._runners[key]
        if runner is None:
            if self._tells:
                self._tells = False
                warn(f"there is no compiled code for these weights and shapes: {call}")
            raise Missing
        return runner.run(call.tensors)[0]

    def _look(self) -> None:
        """Forget what was of other weights."""
        state = state_of(self._module)
        if state != self._state:
            # Held, so that no other tensor gets the id or the memory of one of them.
            self._state, self._held = state, tensors_of(self._module)
            self._runners = {}
            network = network_key(self._module, self._what)
            adapted = any(map(is_adapted, self._module.modules()))
            wanted = not adapted and (self._make is not None or packages(network))
            self._name = f"{network}-{weights_key(self._module)}" if wanted else None

    def _open(self, call: Call) -> Any:
        """What runs the package of a call; None where there is none, or none that may be used."""
        if self._name is None:
            return None
        name, slow = f"{self._name}-{call.key}", getattr(self._module, self._what)
        if self._make is not None and name not in packages(name):
            self._make(slow, call, name)
        path = packages(name).get(name)
        if path is None:
            return None
        if reason := distrust(cache_folder()):
            warn(f"compiled code is not used: {reason}")
            return None
        try:
            runner = _Runner(str(path), 1)
        except RuntimeError as error:
            warn(f"compiled code is not used: {str(error).partition(chr(10))[0]}")
            return None
        args, kwargs = call.arguments(call.tensors)
        checks = Checks(self._module, "compiled code is not used")
        run, compute = lambda: runner.run(call.tensors)[0], lambda: slow(*args, **kwargs)
        return runner if checks.passes(self._what, run, compute) else None


class _InPlace:
    """Stands in the place of a U-Net, as what `torch.compile` makes of one does."""

    def __init__(self, module: nn.Module, code: Compiled) -> None:
        self._orig_mod, self._code = module, code

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return self._code(*args, **kwargs)


class _Decoder:
    """Stands in the place of an autoencoder that decodes whole pictures."""

    def __init__(self, module: KLAutoencoder, code: Compiled) -> None:
        self.config, self.parameters, self.decode = module.config, module.parameters, code


@dataclass(frozen=True, eq=False)
class CompiledNetwork(AroundNetwork):
    """A network that draws with compiled code.

    Gradients, spoilt attention, controls, image prompts, LoRAs and shapes that no code was made for
    are left to the engine inside. The first answer of each package is compared with that of the
    network itself.

    Attributes:
        fast: the network itself, around its code.
        code: of the module.
    """

    fast: Network
    code: Compiled

    @classmethod
    def of(
        cls, network: Network, inner: Network, make: Maker | None = None, *, tells: bool = False
    ) -> Self:
        """This engine around another of a network; see `Compiled`."""
        code = Compiled(network.module, "forward", make, tells=tells)
        stand_in: Any = _InPlace(network.module, code)
        return cls(inner, network.with_module(stand_in), code)

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int] = ()
    ) -> Tensor:
        # a control is computed before the network is, in vain where there is no code
        shown = condition.control or condition.images
        if not (perturbed or shown or torch.is_grad_enabled()):
            try:
                return self.fast(x, t, condition)
            except Missing:
                pass
        return self.inner(x, t, condition, perturbed)

    def perturbable(self, perturbations: Sequence[Perturbation]) -> Self:
        return replace(self, inner=self.inner.perturbable(perturbations))

    def with_module(self, module: nn.Module) -> Self:
        return self.of(self.fast.with_module(module), self.inner.with_module(module))


@dataclass(frozen=True, eq=False)
class CompiledAutoencoder(AroundAutoencoder):
    """An autoencoder that decodes with compiled code; all else is left to the engine inside.

    So are pictures that are decoded in tiles, to take less memory.

    Attributes:
        fast: the autoencoder itself, around its code.
        code: of the module.
    """

    fast: DiffusersAutoencoder
    code: Compiled

    @classmethod
    def of(
        cls, autoencoder: DiffusersAutoencoder, inner: Autoencoder, make: Maker | None = None
    ) -> Self:
        """This engine around another of an autoencoder; see `Compiled`."""
        module: Any = autoencoder.module
        code = Compiled(module, "decode", make)
        stand_in: Any = _Decoder(module, code)
        return cls(inner, DiffusersAutoencoder(stand_in, tiling="off"), code)

    def encode(self, pictures: Tensor) -> Tensor:
        """See `Autoencoder.encode`."""
        return self.inner.encode(pictures)

    def moments(self, pictures: Tensor) -> Tensor:
        """See `Autoencoder.moments`."""
        return self.inner.moments(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        pixels = latents.shape[-2] * latents.shape[-1] * self.factor**2
        if not (torch.is_grad_enabled() or is_large(self.module, pixels)):
            try:
                return self.fast.decode(latents)
            except Missing:
                pass
        return self.inner.decode(latents)

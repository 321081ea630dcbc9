"""Networks as native code: a library for each shape of a call, made by `latentdiff compile`.

Whatever no library was made for is left to the engine inside.
"""

import threading
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from latentdiff.errors import warn
from latentdiff.models.engines.native import Call, Missing, NativeNetwork
from latentdiff.models.engines.packages import (
    cache_folder,
    call_key,
    distrust,
    network_key,
    packages,
    weights_key,
)
from latentdiff.models.engines.state import Checks, Watched, is_adapted
from latentdiff.models.network import Network

# torch's own loader of it imports the compiler, which takes a second.
_Runner: Any = torch._C._aoti.AOTIModelContainerRunnerCpu  # pyright: ignore[reportAttributeAccessIssue]


Maker = Callable[[nn.Module, Call, str], None]
"""Compiles what is called, with its arguments, and keeps the package under a name."""


class Compiled:
    """A network, called through its packages.

    Args:
        module: the network.
        make: makes a package where there is none; None: such calls are `Missing`.
        tells: whether the first such call warns.
    """

    def __init__(
        self, module: nn.Module, make: Maker | None = None, *, tells: bool = False
    ) -> None:
        self._module, self._make, self._tells = module, make, tells
        self._lock = threading.Lock()
        self._watched = Watched(module)
        self._name: str | None = None  # of its packages, up to the call
        self._runners: dict[str, Any] = {}

    def at_hand(self) -> bool:
        """True where there are packages of the network with its weights as they are."""
        known = packages(network_key(self._module))
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
        key = call_key(call.arranged, call.tensors)
        with self._lock:
            self._look()
            if key not in self._runners:
                self._runners[key] = self._open(call)
            runner = self._runners[key]
        if runner is None:
            self._tell(f"there is no compiled code for these weights and shapes: {call}")
            raise Missing
        return runner.run(call.tensors)[0]

    def of(self, module: nn.Module) -> Self:
        """See `Code.of`."""
        return type(self)(module)

    def left(self, what: str) -> None:
        """See `Code.left`."""
        self._tell(f"there is no compiled code for {what}")

    def _tell(self, what: str) -> None:
        if self._tells:
            self._tells = False
            warn(what)

    def _look(self) -> None:
        """Forget what was of other weights."""
        if self._watched.changed():
            self._runners = {}
            network = network_key(self._module)
            adapted = any(map(is_adapted, self._module.modules()))
            wanted = not adapted and (self._make is not None or packages(network))
            self._name = f"{network}-{weights_key(self._module)}" if wanted else None

    def _open(self, call: Call) -> Any:
        """What runs the package of a call; None where there is none, or none that may be used."""
        if self._name is None:
            return None
        key = call_key(call.arranged, call.tensors)
        name = f"{self._name}-{key}"
        if self._make is not None and name not in packages(name):
            self._make(self._module, call, name)
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
        run, compute = lambda: runner.run(call.tensors)[0], lambda: self._module(*args, **kwargs)
        return runner if checks.passes("predict", run, compute) else None


class CompiledNetwork(NativeNetwork):
    """A network that draws with compiled code.

    Weights and shapes that no code was made for are left to the engine inside, too. The first
    answer of each package is compared with that of the network itself.
    """

    code: Compiled

    @classmethod
    def of(
        cls, network: Network, inner: Network, make: Maker | None = None, *, tells: bool = False
    ) -> Self:
        """This engine around another of a network; see `Compiled`."""
        return cls.around(network, inner, Compiled(network.module, make, tells=tells))

"""Weights packed once into the layout that oneDNN computes with, instead of at every call.

Activations are channels-last, a convolution of what was doubled is computed before it is, keys and
values of a prompt are computed once a run, and all of a network's projections of time at once.
Weights that are mapped from their file need no memory beside the packed ones: they are read from it
again for a LoRA, or for what is not computed packed.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from latentdiff.diffusion.condition import Condition
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.engines.around import AroundAutoencoder, AroundNetwork
from latentdiff.models.engines.packed_layers import packed, replayable
from latentdiff.models.engines.state import Checks, Watched, cannot_compute
from latentdiff.models.engines.tape import ReplayedUNet, replay_decoding
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.network import Network
from latentdiff.models.perturbation import Perturbation, perturbable

_CHECKED = 8  # side in latents of what is compared of an autoencoder


def cannot_pack(module: nn.Module) -> str | None:
    """The reason why a network cannot be packed here; None where it can."""
    if (reason := cannot_compute(module)) is not None:
        return reason
    parameter = next(module.parameters())
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "this torch has no oneDNN"
    halves = parameter.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if parameter.dtype != torch.float32 and not halves:
        return f"this CPU has no {str(parameter.dtype).removeprefix('torch.')} of its own"
    return None


class Packing:
    """The packed twin of a network: made when first asked for, and anew when weights change.

    Args:
        module: the network; it stays as it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._weights = sum(each.numel() for each in module.parameters())
        self._watched = Watched(module)
        self._twin: Any = None
        self._computing: tuple[Network | None, Network | None] = None, None
        self.checks = Checks(module, "packed weights are not used")

    @property
    def works(self) -> bool:
        """True where the network can be packed, and no answer was found to differ."""
        return cannot_pack(self._module) is None and not self.checks.failed()

    def usable(self) -> bool:
        """See `works`; where it does not, nothing of the twin is kept."""
        return self.works or self.twin() is not None

    def twin(self) -> Any:
        """The packed network; None where there is none, and then nothing of one is kept."""
        with self._lock:
            if not self.works:
                self._watched.forget()
                self._twin = None
                self._computing = None, None
                return None
            if self._watched.changed():
                self._twin = None  # before the next one takes memory
                self._computing = None, None
                self._twin = packed(self._module)
                if isinstance(self._twin, KLAutoencoder) and replayable(self._twin):
                    replay_decoding(self._twin, self._weights)
            return self._twin

    def computing(self, network: Network) -> Network | None:
        """A network with the packed one in its module's place; None where there is none."""
        twin = self.twin()
        if twin is None:
            return None
        made, of = self._computing
        if made is None or made.module is not twin or of is not network:
            # Networks take what replays it as what `torch.compile` makes.
            module: Any = ReplayedUNet(twin, self._weights) if replayable(twin) else twin
            made = network.with_module(module)
            self._computing = made, network
        return made

    def compare(self, what: str, fast: Callable[[], Tensor], slow: Callable[[], Tensor]) -> None:
        """Compare the first answers of a kind, before `answer` is asked for others."""
        if not self.checks.passes(what, fast, slow):
            self.twin()

    def answer(self, what: str, fast: Callable[[], Tensor], slow: Callable[[], Tensor]) -> Tensor:
        """See `Checks.answer`; what is found to differ is let go at once."""
        answer = self.checks.answer(what, fast, slow)
        if self.checks.failed():
            self.twin()
        return answer


class Spoiling:
    """The packed twin of a network whose attention can be spoilt.

    Args:
        packing: of the network.
        perturbations: of its attention.
    """

    def __init__(
        self, packing: "Packing | Spoiling", perturbations: Sequence[Perturbation]
    ) -> None:
        self._packing, self._perturbations = packing, perturbations
        self._made: tuple[Any, Any] = (None, None)

    @property
    def works(self) -> bool:
        """See `Packing.works`."""
        return self._packing.works

    def usable(self) -> bool:
        """See `Packing.usable`."""
        return self._packing.usable()

    def twin(self) -> Any:
        """See `Packing.twin`."""
        twin = self._packing.twin()
        if twin is None:
            self._made = None, None
            return None
        if self._made[0] is not twin:
            self._made = twin, perturbable(twin, self._perturbations)
        return self._made[1]

    def computing(self, network: Network) -> Network | None:
        """See `Packing.computing`."""
        twin = self.twin()
        return None if twin is None else network.with_module(twin)

    def answer(self, what: str, fast: Callable[[], Tensor], slow: Callable[[], Tensor]) -> Tensor:
        """See `Packing.answer`; it is compared apart from the network whose attention is whole."""
        return self._packing.answer(f"spoilt {what}", fast, slow)


@dataclass(frozen=True, eq=False)
class PackedNetwork(AroundNetwork):
    """A network that draws with packed weights.

    Gradients, and whatever cannot be packed, are left to the one inside. The first answer is
    compared with its.

    Attributes:
        packing: of the module.
    """

    packing: Packing | Spoiling

    @classmethod
    def of(cls, network: Network) -> Self:
        """This engine around a network."""
        return cls(network, Packing(network.module))

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int] = ()
    ) -> Tensor:
        given = x, t, condition, perturbed

        def fast() -> Tensor:
            return (self.packing.computing(self.inner) or self.inner)(*given)

        if torch.is_grad_enabled() or not self.packing.usable():
            return self.inner(*given)
        return self.packing.answer("predict", fast, lambda: self.inner(*given)).contiguous()

    def perturbable(self, perturbations: Sequence[Perturbation]) -> Self:
        inner = self.inner.perturbable(perturbations)
        return replace(self, inner=inner, packing=Spoiling(self.packing, perturbations))

    def with_module(self, module: nn.Module) -> Self:
        return self.of(self.inner.with_module(module))


@dataclass(frozen=True, eq=False)
class PackedAutoencoder(AroundAutoencoder):
    """An autoencoder that encodes and decodes with packed weights.

    Gradients, and whatever cannot be packed, are left to the one inside. The first answers are
    compared with its, on a part of a picture.

    Attributes:
        packing: of the module.
    """

    inner: DiffusersAutoencoder
    packing: Packing

    @classmethod
    def of(cls, autoencoder: DiffusersAutoencoder) -> Self:
        """This engine around an autoencoder."""
        return cls(autoencoder, Packing(autoencoder.module))

    def encode(self, pictures: Tensor) -> Tensor:
        """See `Autoencoder.encode`."""
        return self._compute("encode", pictures, _CHECKED * self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        return self._compute("decode", latents, _CHECKED)

    @torch.no_grad()
    def moments(self, pictures: Tensor) -> Tensor:
        """See `Autoencoder.moments`."""
        return self._compute("moments", pictures, _CHECKED * self.factor)

    def _compute(self, what: str, x: Tensor, side: int) -> Tensor:
        slow = getattr(self.inner, what)

        def fast(x: Tensor) -> Tensor:
            twin = self.packing.twin()
            inner = self.inner if twin is None else replace(self.inner, module=twin)
            return getattr(inner, what)(x)

        if torch.is_grad_enabled() or not self.packing.usable():
            return slow(x)
        part = x[:1, :, :side, :side]
        if part.shape != x.shape:
            self.packing.compare(what, lambda: fast(part), lambda: slow(part))
        return self.packing.answer(what, lambda: fast(x), lambda: slow(x)).contiguous()

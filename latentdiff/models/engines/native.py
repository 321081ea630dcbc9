"""Networks as native code: what engines that compute by it have in common.

Each call is of one shape, and whatever there is no code for is left to the engine inside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from latentdiff.diffusion.condition import Condition
from latentdiff.models.autoencoder import Autoencoder, DiffusersAutoencoder
from latentdiff.models.engines.around import AroundAutoencoder, AroundNetwork
from latentdiff.models.engines.state import cannot_compute
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.network import Network
from latentdiff.models.perturbation import Perturbation
from latentdiff.models.tiling import is_large


class Missing(Exception):
    """There is no code for a call."""


class Call:
    """The arguments of a call of a network.

    Attributes:
        tensors: all tensors among them, contiguous, as code takes them.

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
    def arranged(self) -> str:
        """How the tensors are arranged among the arguments."""
        return str(self._spec)

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with tensors in place of its own."""
        return tree_unflatten(list(tensors), self._spec)


class Method(nn.Module):
    """A method of a network as a network of tensors alone."""

    def __init__(self, method: Callable[..., Tensor], call: Call) -> None:
        super().__init__()
        self.network = method.__self__  # pyright: ignore[reportFunctionMemberAccess]
        self.name = method.__name__
        self.call = call

    def forward(self, *tensors: Tensor) -> Tensor:
        args, kwargs = self.call.arguments(tensors)
        return getattr(self.network, self.name)(*args, **kwargs)


def cannot_compile(module: nn.Module) -> str | None:
    """The reason why a network has no code here; None where it may have."""
    if (reason := cannot_compute(module)) is not None:
        return reason
    parameter = next(module.parameters())
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        return f"it does not compute in {str(parameter.dtype).removeprefix('torch.')}"
    return None


def can_compile(autoencoder: Autoencoder) -> TypeGuard[DiffusersAutoencoder]:
    """True for an autoencoder whose decoder may have code; not in tiles, of any size."""
    known = isinstance(autoencoder, DiffusersAutoencoder) and autoencoder.tiling != "on"
    return known and not cannot_compile(autoencoder.module)


class Code(Protocol):
    """A method of a network as native code."""

    @property
    def used(self) -> bool:
        """True once it has computed an answer."""
        ...

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """Its answer.

        Raises:
            Missing: there is no code for the call.
        """
        ...

    def of(self, module: nn.Module) -> Self:
        """The same method of another network."""
        ...

    def left(self, what: str) -> None:
        """Hear that calls with such a thing are left to the engine inside."""
        ...


class _InPlace:
    """Stands in the place of a U-Net, as what `torch.compile` makes of one does."""

    def __init__(self, module: nn.Module, code: Code) -> None:
        self._orig_mod, self._code = module, code

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return self._code(*args, **kwargs)


class _Decoder:
    """Stands in the place of an autoencoder that decodes whole pictures."""

    def __init__(self, module: KLAutoencoder, code: Code) -> None:
        self.config, self.parameters, self.decode = module.config, module.parameters, code


@dataclass(frozen=True, eq=False)
class NativeNetwork(AroundNetwork):
    """A network that draws with native code.

    Gradients, spoilt attention, controls, image prompts, and calls that no code is for, are left to
    the engine inside.

    Attributes:
        fast: the network itself, around its code.
        code: of the module's `forward`.
    """

    fast: Network
    code: Code

    @classmethod
    def around(cls, network: Network, inner: Network, code: Code) -> Self:
        """This engine around another of a network."""
        stand_in: Any = _InPlace(network.module, code)
        return cls(inner, network.with_module(stand_in), code)

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int] = ()
    ) -> Tensor:
        # a control is computed before the network is, in vain where there is no code
        lacking = {
            "spoilt attention": perturbed,
            "controls": condition.control,
            "image prompts": condition.images,
        }
        left = [what for what, given in lacking.items() if given]
        if left:
            self.code.left(" and ".join(left))
        elif not torch.is_grad_enabled():
            try:
                return self.fast(x, t, condition)
            except Missing:
                pass
        return self.inner(x, t, condition, perturbed)

    def perturbable(self, perturbations: Sequence[Perturbation]) -> Self:
        return replace(self, inner=self.inner.perturbable(perturbations))

    def with_module(self, module: nn.Module) -> Self:
        fast, inner = self.fast.with_module(module), self.inner.with_module(module)
        return self.around(fast, inner, self.code.of(module))


@dataclass(frozen=True, eq=False)
class NativeAutoencoder(AroundAutoencoder):
    """An autoencoder that decodes with native code; all else is left to the engine inside.

    So are pictures that are decoded in tiles, to take less memory.

    Attributes:
        fast: the autoencoder itself, around its code.
        code: of the module's `decode`.
    """

    fast: DiffusersAutoencoder
    code: Code

    @classmethod
    def around(cls, autoencoder: DiffusersAutoencoder, inner: Autoencoder, code: Code) -> Self:
        """This engine around another of an autoencoder."""
        module: Any = autoencoder.module
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

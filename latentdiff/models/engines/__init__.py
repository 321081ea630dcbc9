"""Engines: the same networks, computed faster.

An engine stands around a network or an autoencoder, has its facts and its weights, and hands what
it cannot do to the one inside.
"""

from typing import Literal, get_args

import torch

from latentdiff.errors import UserError, warn
from latentdiff.models.autoencoder import Autoencoder, DiffusersAutoencoder
from latentdiff.models.engines.compiled import CompiledNetwork
from latentdiff.models.engines.native import (
    NativeAutoencoder,
    NativeNetwork,
    can_compile,
    cannot_compile,
)
from latentdiff.models.engines.openvino import OpenVinoAutoencoder, OpenVinoNetwork, cannot_convert
from latentdiff.models.engines.packages import cache_folder, distrust
from latentdiff.models.engines.packed import PackedAutoencoder, PackedNetwork, cannot_pack
from latentdiff.models.network import Network
from latentdiff.registry import check_name

Engine = Literal["auto", "eager", "packed", "compiled", "openvino"]
"""How networks are computed: as they are; with weights in oneDNN's own layout, on a CPU; by the
code that `latentdiff compile` made; by OpenVINO. "auto" is the first that works of compiled, packed
and eager."""

Pair = tuple[Network, Autoencoder]


def with_engine(network: Network, autoencoder: Autoencoder, engine: Engine) -> Pair:
    """The network and the autoencoder, inside the engine.

    Raises:
        UserError: unknown name, or this engine cannot compute the network here.
    """
    check_name("engine", engine, get_args(Engine))
    itself = network, autoencoder
    if engine == "eager":
        return itself
    if engine == "packed" and (reason := cannot_pack(network.module)):
        raise UserError(f"engine 'packed': {reason}; leave it out, or take 'eager'.")
    inner = _packed(itself)
    if engine == "packed":
        return inner
    if engine == "openvino":
        return _openvino(itself, inner)
    if engine == "compiled" and (reason := cannot_compile(network.module) or _distrusted()):
        raise UserError(f"engine 'compiled': {reason}; leave it out, or take another.")
    fast = with_code(itself, inner, tells=engine == "compiled")
    if engine == "compiled" and fast is inner:
        count = torch.get_num_threads()
        raise UserError(
            "engine 'compiled': there is no code of this model for this processor, this torch and "
            f"{count} thread{'s' * (count > 1)}: make it with `latentdiff compile`, or leave the "
            "engine out."
        )
    return fast


def with_code(itself: Pair, inner: Pair, *, tells: bool = False) -> Pair:
    """The engines of `inner`, inside compiled code where the user's cache has some of the model.

    Args:
        itself: the network and the autoencoder in no engine.
        inner: what computes them where there is no code.
        tells: whether the first such call warns.
    """
    network, _ = itself
    if cannot_compile(network.module):
        return inner
    fast = CompiledNetwork.of(network, inner[0], tells=tells)
    if not fast.code.at_hand():
        return inner
    if reason := distrust(cache_folder()):
        warn(f"compiled code is not used: {reason}")
        return inner
    return fast, inner[1]


def _openvino(itself: Pair, inner: Pair) -> Pair:
    """By OpenVINO, and by the engines of `inner` what that leaves to them."""
    network, autoencoder = itself
    if reason := cannot_convert(network.module):
        raise UserError(f"engine 'openvino': {reason}; leave it out, or take another.")
    decoder = inner[1]
    if can_compile(autoencoder):
        decoder = OpenVinoAutoencoder.of(autoencoder, decoder)
    return OpenVinoNetwork.of(network, inner[0]), decoder


def _distrusted() -> str | None:
    """The reason why compiled code that is there must not run."""
    folder = cache_folder()
    return distrust(folder) if folder.exists() else None


def _packed(itself: Pair) -> Pair:
    """Each in the packed engine, where that can compute it."""
    network, autoencoder = itself
    if isinstance(autoencoder, DiffusersAutoencoder) and not cannot_pack(autoencoder.module):
        autoencoder = PackedAutoencoder.of(autoencoder)
    return network if cannot_pack(network.module) else PackedNetwork.of(network), autoencoder


def engine_of(network: Network, autoencoder: Autoencoder) -> Engine:
    """The engine by which these are computed; "auto" where it computes the autoencoder alone.

    Packed weights that were found faulty are no engine, nor is compiled code that nothing was
    computed by.
    """
    engine, decoder = _name(network), _name(autoencoder)
    return "auto" if engine == "eager" != decoder else engine


def _name(noun: Network | Autoencoder) -> Engine:
    if isinstance(noun, NativeNetwork | NativeAutoencoder):
        native = "compiled" if isinstance(noun, CompiledNetwork) else "openvino"
        return native if noun.code.used else _name(noun.inner)
    packed = isinstance(noun, PackedNetwork | PackedAutoencoder) and noun.packing.works
    return "packed" if packed else "eager"

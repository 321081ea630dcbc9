"""Engines: the same networks, computed faster.

An engine stands around a network or an autoencoder, has its facts and its weights, and hands what
it cannot do to the one inside.
"""

from typing import Literal, get_args

from latentdiff.errors import UserError
from latentdiff.models.autoencoder import Autoencoder, DiffusersAutoencoder
from latentdiff.models.engines.packed import PackedAutoencoder, PackedNetwork, cannot_pack
from latentdiff.models.network import Network
from latentdiff.registry import check_name

Engine = Literal["auto", "eager", "packed"]
"""How networks are computed: as they are; or with weights in oneDNN's own layout, on a CPU. "auto"
is packed wherever that works."""


def with_engine(
    network: Network, autoencoder: Autoencoder, engine: Engine
) -> tuple[Network, Autoencoder]:
    """The network and the autoencoder, inside the engine.

    Raises:
        UserError: unknown name, or this engine cannot compute the network here.
    """
    check_name("engine", engine, get_args(Engine))
    if engine == "eager":
        return network, autoencoder
    reason = cannot_pack(network.module)
    if engine == "packed" and reason:
        raise UserError(f"engine 'packed': {reason}; leave it out, or take 'eager'.")
    if isinstance(autoencoder, DiffusersAutoencoder) and not cannot_pack(autoencoder.module):
        autoencoder = PackedAutoencoder.of(autoencoder)
    return network if reason else PackedNetwork.of(network), autoencoder

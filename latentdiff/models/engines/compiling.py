"""The compiler behind `latentdiff compile`: AOTInductor of torch, weights frozen into the code."""

import atexit
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentdiff.errors import UserError
from latentdiff.files import scratch_folder
from latentdiff.models.engines.compiled import CompiledNetwork, Maker
from latentdiff.models.engines.native import Call, Method, cannot_compile
from latentdiff.models.engines.packages import SETTINGS, keep
from latentdiff.models.network import Network

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def compiling(network: Network, say: Callable[[str], None]) -> Iterator[Network]:
    """The network, which in the block compiles whatever it is called for that the cache lacks.

    Args:
        network: itself, in no engine.
        say: is told of each step; a package takes a minute or more.

    Raises:
        UserError: the network cannot be compiled, or there is no compiler.
    """
    if reason := cannot_compile(network.module):
        raise UserError(f"this model cannot be compiled: {reason}.")
    with scratch_folder() as folder, _cache_in(folder):
        check_compiler()
        yield CompiledNetwork.of(network, network, _maker(say))


def training_code(network: nn.Module) -> nn.Module:
    """What `torch.compile` makes of a network, forward and backward, at its first call.

    What it compiles goes with the process, unless TORCHINDUCTOR_CACHE_DIR names a folder: a run
    that is killed while it compiles leaves files that the next one could not read.

    Raises:
        UserError: there is no compiler.
    """
    if _CACHE not in os.environ:
        rest = ExitStack()
        os.environ[_CACHE] = str(rest.enter_context(scratch_folder()))
        atexit.register(rest.close)
    check_compiler()
    compiled: Any = torch.compile(network)
    return compiled


def check_compiler() -> None:
    """Look for the C++ compiler that torch would call.

    Raises:
        UserError: there is none.
    """
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError) as error:
        raise UserError(
            "there is no C++ compiler here, which compiling needs: install g++ (Debian, Ubuntu: "
            "apt install g++) or name one in the variable CXX; drawing and training work without."
        ) from error


def _maker(say: Callable[[str], None]) -> Maker:
    """What compiles packages and keeps them in the user's cache."""

    def make(module: nn.Module, call: Call, name: str) -> None:
        say(f"compiling the U-Net for {call}")
        start = time.monotonic()
        path = keep(_library(module, call), name)
        say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {time.monotonic() - start:.0f} seconds")

    return make


def _library(module: nn.Module, call: Call) -> Path:
    """Compile a network for the shapes of a call.

    Raises:
        UserError: the compiler failed.
    """
    import torch._inductor.config as settings
    from torch._inductor import aot_compile

    given = tuple(call.tensors)
    known = {key: value for key, value in SETTINGS.items() if hasattr(settings, key)}
    try:
        # Of `torch.compile` and `aot_compile` these have no effect: they must stand globally.
        with torch.no_grad(), settings.patch(**known), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage")  # torch's own use of it
            method = Method(module.forward, call).eval()
            graph: Any = torch.export.export(method, given).module()
            return Path(str(aot_compile(graph, given)))
    except Exception as error:  # compilers raise anything
        told = " ".join(str(error).split())
        raise UserError(f"compiling failed: {told:.300}") from error


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Have torch keep what it compiles by the way in a folder of our own: its own has a name that
    others of this machine know, and it runs what it finds there."""
    before = os.environ.get(_CACHE)
    os.environ[_CACHE] = str(folder)
    try:
        yield
    finally:
        del os.environ[_CACHE]
        if before is not None:
            os.environ[_CACHE] = before

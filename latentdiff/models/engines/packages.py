"""Native code of networks in the user's own cache: what a file of it is of, and whose it is.

A package is a library that the compiler of this machine made of one network, its weights and the
shapes of one call. It is code: whoever can write to its folder decides what runs.
"""

import hashlib
import os
import platform
import shutil
import stat
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.files import make_folder, writing
from latentdiff.models import attention, blocks, cross_attention_unet
from latentdiff.models.identity import weights_hash

_LETTERS = 24  # of each of the three hashes in a name: 96 bits
# What a graph is traced from: a change of the sources makes other packages.
_SOURCES = attention, blocks, cross_attention_unet
SETTINGS: dict[str, Any] = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "autotune_num_choices_displayed": 0,
    "max_autotune_report_choices_stats": False,
}
"""What is set for the compiler, as far as this torch knows it: weights are part of the code, and of
matrix products oneDNN's and ones written for their shapes are tried, silently. In bfloat16 on a CPU
with AMX a call of the bundled U-Net takes 0.7 of the time so; in float32 it takes the same."""


def cache_folder() -> Path:
    """The folder of compiled packages, which may not be there yet."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "latentdiff/compiled"


def distrust(folder: Path) -> str | None:
    """The reason why code in a folder must not run, for others could have put it there; or None."""
    if not hasattr(os, "getuid"):
        return "this system does not say whose folders are"
    user = os.getuid()
    try:
        folder = folder.resolve()
        for place in (folder, *folder.parents):
            facts = place.stat()
            writable = stat.S_IWOTH | (stat.S_IWGRP if place == folder else 0)
            others = bool(facts.st_mode & writable)
            if place != folder and facts.st_mode & stat.S_ISVTX:  # as /tmp: nobody moves another's
                others = False
            owners = {user} if place == folder else {user, 0}
            if others or facts.st_uid not in owners:
                whose = "others may write to it" if others else "it is another user's"
                return f"{place}: {whose}"
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None


def network_key(module: nn.Module) -> str:
    """All that code of a network depends on but for its weights and the shapes, as letters."""
    config: Any = module.config
    layers = [part for part in module.modules() if isinstance(part, attention.AttentionLayer)]
    facts = (
        type(module).__name__,
        sorted((key, repr(value)) for key, value in config.items()),
        [layer.processor.__qualname__ for layer in layers],
        _machine(),
        torch.get_num_threads(),  # the compiler writes it into loops
    )
    return _letters(repr(facts).encode())


def weights_key(module: nn.Module) -> str:
    """The weights of a network, as letters."""
    return _letters(weights_hash(module.state_dict()).encode())


def call_key(call: str, tensors: Sequence[Tensor]) -> str:
    """The shapes and types of a call's tensors, as letters.

    Args:
        call: how they are arranged.
        tensors: in their order.
    """
    return _letters(repr([call, [(list(t.shape), t.dtype) for t in tensors]]).encode())


def packages(start: str) -> dict[str, Path]:
    """The packages whose names, `NETWORK-WEIGHTS-CALL` of the keys above, begin like this."""
    try:
        return {path.stem: path for path in cache_folder().glob(f"{start}*.so")}
    except OSError:  # a folder that may not be read
        return {}


def keep(library: Path, name: str) -> Path:
    """Put a library into the cache.

    Raises:
        UserError: it cannot be written, or others could write there.
    """
    folder = cache_folder()
    new = not folder.exists()
    make_folder(folder)
    if new:  # what others could have written to before stays refused
        folder.chmod(0o700)
    if reason := distrust(folder):
        raise UserError(f"compiled code is not kept where others could change it: {reason}.")
    target = folder / f"{name}.so"
    with writing(target, replace=True) as stage:
        shutil.copyfile(library, stage)
    return target


@cache
def _machine() -> str:
    """The processor, torch, and the sources that are compiled."""
    flags = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        pass
    sources = [Path(str(module.__file__)).read_bytes() for module in _SOURCES]
    facts = platform.machine(), flags, torch.__version__, torch.version.git_version
    return repr((*facts, SETTINGS, sources))


def _letters(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_LETTERS]

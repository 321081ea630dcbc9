"""Checkpoints that are whole or not there at all.

A checkpoint is a folder `step-00000500` of safetensors files and a `state.json`. It is written
beside its target, every file fsynced, given a sha256 manifest, renamed, and the parent folder
fsynced; only then are old ones removed. A damaged newest checkpoint falls back to the one before.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
MANIFEST = "manifest.json"


def save_checkpoint(
    root: Path, step: int, tensors: dict[str, Tensors], state: dict[str, object], keep: int = 2
) -> Path:
    """Write `root/step-XXXXXXXX` with one safetensors file per entry of `tensors`.

    Args:
        state: JSON-able values (counters, the seed); the step is added.
        keep: how many newest checkpoints stay, at least two.
    """
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"step-{step:08d}"
    stage = root / f".stage-{target.name}"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    for name, values in tensors.items():
        packed = {key: value.detach().cpu().contiguous() for key, value in values.items()}
        save_file(packed, stage / f"{name}.safetensors")
    (stage / "state.json").write_text(json.dumps({**state, "step": step}, indent=1))
    manifest = {path.name: _sha256(path) for path in sorted(stage.iterdir())}
    (stage / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in stage.iterdir():
        sync(path)
    sync(stage)
    if target.exists():  # the same step saved before: a damaged one that was passed over
        shutil.rmtree(target)
    stage.rename(target)
    sync(root)
    for old in checkpoints(root)[max(keep, 2) :]:
        shutil.rmtree(old)
    return target


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints under `root`, newest first."""
    return sorted((p for p in root.glob("step-*") if p.is_dir()), reverse=True)


def load_newest(
    root: Path, complain: Callable[[str], None] = print
) -> tuple[dict[str, Tensors], dict[str, object]] | None:
    """The newest checkpoint that is whole, as (tensors, state); None where there is none.

    `complain` is told, a line each, which newer ones were passed over and which file was bad.
    """
    for folder in checkpoints(root):
        fault = find_fault(folder)
        if fault is not None:
            complain(f"checkpoint {folder.name} is damaged ({fault}); trying the one before it")
            continue
        tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        return tensors, json.loads((folder / "state.json").read_text())
    return None


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = dict(manifest).items()
    except (OSError, ValueError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, digest in names:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} does not match its sha256"
        if path.suffix == ".safetensors":
            try:
                load_file(path)
            except SafetensorError as error:
                return f"{name}: {error}"
    return None


def pack_optimizer(optimizer: torch.optim.Optimizer) -> Tensors:
    """An optimizer's per-parameter state as flat tensors `index.key`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entry in state.items()
        for key, value in entry.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, packed: Tensors) -> None:
    """Put what `pack_optimizer` gave back; hyper-parameters stay as they are."""
    whole = optimizer.state_dict()
    state: dict[int, Tensors] = {}
    for name, value in packed.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

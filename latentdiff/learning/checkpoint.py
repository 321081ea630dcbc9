"""Checkpoints that are whole or not there at all.

A checkpoint is a folder `step-00000500` of safetensors files, a `state.json` and a sha256 manifest.
`latentdiff.files` stages, syncs and renames it; only then are old ones removed. A damaged newest
checkpoint falls back to the one before. The manifest ends with the sum of itself, so that damage
to it is not taken for damage to a file.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.files import make_folder, sweep, writing_folder
from latentdiff.formats.weights import write_tensors
from latentdiff.learning.sharding import split_like

Tensors = dict[str, Tensor]
MANIFEST = "manifest.json"


def save_checkpoint(
    root: Path, step: int, tensors: dict[str, Tensors], state: dict[str, object], keep: int = 2
) -> Path:
    """Write `root/step-XXXXXXXX` with one safetensors file per entry of `tensors`.

    Args:
        state: JSON-able values (counters, the seed); the step is added.
        keep: number of newest checkpoints to keep, at least two.
    """
    target = root / f"step-{step:08d}"
    try:
        make_folder(root)
        sweep(root)
        # what has this name is damaged, or the run would have gone on after it
        with writing_folder(target, replace=True) as stage:
            _fill(stage, tensors, {**state, "step": step})
    except (UserError, OSError) as error:
        whole = [path.name for path in checkpoints(root)]
        kept = f"{whole[0]} is untouched" if whole else "there is no earlier one"
        raise UserError(f"{error}; {kept}") from None
    _prune(root, target, max(keep, 2))
    return target


def _fill(stage: Path, tensors: dict[str, Tensors], state: dict[str, object]) -> None:
    """Every file of a checkpoint, and at last the manifest."""
    for name, values in tensors.items():
        packed = {key: value.detach().cpu() for key, value in values.items()}
        write_tensors(packed, stage / f"{name}.safetensors")
    (stage / "state.json").write_text(json.dumps(state, indent=1))
    (stage / MANIFEST).write_text(_manifest({p.name: _sha256(p) for p in sorted(stage.iterdir())}))


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Leave `keep` checkpoints up to `newest`; later ones were damaged, or it would not be new."""
    found = checkpoints(root)
    kept = [path for path in found if path.name <= newest.name][:keep]
    for path in found:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints under `root`, newest first."""
    return sorted((p for p in root.glob("step-*") if p.is_dir()), reverse=True)


def load_newest(
    root: Path, complain: Callable[[str], None] = print
) -> tuple[dict[str, Tensors], dict[str, object]] | None:
    """The newest checkpoint that is whole, as (tensors, state); None where there never was one.

    `complain` is told, a line each, which newer ones were passed over and which file was bad.

    Raises:
        UserError: there are checkpoints, but none is whole. To start anew then would in the end
            remove them all.
    """
    found = checkpoints(root)
    for folder in found:
        fault = find_fault(folder)
        if fault is not None:
            complain(f"checkpoint {folder.name} is damaged ({fault}); trying the one before it")
            continue
        tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        return tensors, json.loads((folder / "state.json").read_text())
    if found:
        raise UserError(f"no checkpoint in {root} is whole; move that folder away to start anew")
    return None


def find_fault(folder: Path) -> str | None:
    """Find what is wrong with a checkpoint: a message that names the file, or None."""
    try:
        text = (folder / MANIFEST).read_text()
        names: dict[str, str] = json.loads(text)["sha256"]
        if text != _manifest(names):
            return f"{MANIFEST} does not match its own sha256"
    except (OSError, ValueError, TypeError, KeyError):
        return f"{MANIFEST} cannot be read"
    for name, digest in names.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            if _sha256(path) != digest:
                return f"{name} does not match its sha256"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _manifest(names: dict[str, str]) -> str:
    """JSON of every file's sum, with the sum of those lines beside them."""
    own = hashlib.sha256(json.dumps(names, indent=1).encode()).hexdigest()
    return json.dumps({"sha256": names, "own": own}, indent=1)


# What optimizers of `learning.optimizers` count and estimate for a whole group of parameters.
_RUNNING = ("k", "d", "d_max", "d_numerator", "weight_sum", "lr_max")
_GROUP = "group-"


def pack_optimizer(optimizer: torch.optim.Optimizer) -> Tensors:
    """An optimizer's state as flat tensors: `index.key` of parameters, `group-number.key`."""
    packed: Tensors = {
        f"{_GROUP}{number}.{key}": torch.tensor(group[key], dtype=torch.float64)
        for number, group in enumerate(optimizer.param_groups)
        for key in _RUNNING
        if key in group
    }
    seen: set[int] = set()
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            parts = value if isinstance(value, dict) else {key: value}  # bitsandbytes nests some
            for name, part in parts.items():
                tensor = torch.as_tensor(part)
                if tensor.data_ptr() in seen:  # its table of all parameters, which no file takes
                    tensor = tensor.clone()
                seen.add(tensor.data_ptr())
                packed[f"{index}.{name}"] = tensor
    return packed


def unpack_optimizer(optimizer: torch.optim.Optimizer, packed: Tensors) -> None:
    """Put what `pack_optimizer` gave back; hyper-parameters stay as they are."""
    whole = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor | int]] = {}
    for name, value in packed.items():
        index, _, key = name.partition(".")
        if index.startswith(_GROUP):
            group = whole["param_groups"][int(index.removeprefix(_GROUP))]
            group[key] = type(group[key])(value.item())
            continue
        entry = state.setdefault(int(index), {})
        if value.dtype == torch.int64 and value.ndim == 0:  # a count that was a plain number
            entry[key] = int(value)
        else:
            entry[key] = split_like(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

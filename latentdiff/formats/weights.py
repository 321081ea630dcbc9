"""Weights of one network: safetensors in, every tensor checked against the config; safetensors out.

A network is first built without memory, so what a hostile config can ask for costs nothing: only
what the files really hold is ever allocated.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from latentdiff.errors import UserError, shown, warn
from latentdiff.files import make_folder, writing
from latentdiff.memory import let_go_of_pages
from latentdiff.reading import open_regular, parse_json, read_text, reason

_MAX_JSON_BYTES = 64 * 2**20
_MAX_NUMBER = 1_000_000
PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"})
"""Ends of the names of weights that are pickles."""

Network = TypeVar("Network", bound=nn.Module)


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file whose numbers are of a sane size.

    Raises:
        UserError: no such file, not JSON, not an object, or a number no config would hold.
    """
    try:
        value = parse_json(read_text(path, _MAX_JSON_BYTES))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; a model folder needs it.") from error
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}.") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({first_line(error)}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is needed, not {type(value).__name__}.")
    return value


def check_numbers(value: object, name: str) -> None:
    """Refuse the numbers that make builders allocate or loop without end, and keys without a name.

    Raises:
        UserError: a number is not finite or beyond a million, a list is beyond a million long, or
            a key is empty.
    """
    if isinstance(value, dict):
        if "" in value:
            raise UserError(f"{name}: it has a key without a name, '': take it out.")
        for key, part in value.items():
            check_numbers(part, f"{name}: {key:.60}")
    elif isinstance(value, list):
        if len(value) > _MAX_NUMBER:
            raise UserError(f"{name}: a list of {len(value)} is too long.")
        for part in value:
            check_numbers(part, name)
    elif isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER:  # NaN is refused, too
        raise UserError(f"{name}: {value!s:.30} is not a sensible value.")


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Say in a `UserError` of the block which path it is about, if it does not say so already."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(str(path)):
            raise
        raise UserError(f"{path}: {error}") from error


def first_line(error: BaseException) -> str:
    """Shorten the message of an exception to one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def warn_left_out(file: Path, names: list[str]) -> None:
    """Say which tensors of a file were left out, if any were."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warn(f"{file}: left out, for no picture needs it: {shown(names[0], 200)}{more}.")


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of one network: one file, or those of an index.

    Args:
        folder: the folder of the network.
        stem: "model" for transformers, "diffusion_pytorch_model" for diffusers.
        variant: taken where it is there. Else, and with None, the weights without a variant are
            taken, then fp16, then the only one that there is.

    Raises:
        UserError: there are none or several variants, a shard is missing, or only a pickle is
            there.
    """
    found = _variants(folder, stem)
    for wanted in (variant, "", "fp16"):
        if wanted is not None and wanted in found:
            return found[wanted]()
    if len(found) == 1:
        return next(iter(found.values()))()
    if found:
        raise UserError(
            f"{folder}: it has weights of several variants, {', '.join(sorted(found))}: say which "
            "with variant=... (--variant on the command line)."
        )
    pickles = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICKLES)
    if pickles:
        raise UserError(pickle_refusal(pickles[0]))
    raise UserError(f"{folder / stem}.safetensors: no such file; a model folder needs it.")


def _variants(folder: Path, stem: str) -> dict[str, Callable[[], list[Path]]]:
    """For each variant what lists its files; "" is the variant without a name."""
    found: dict[str, Callable[[], list[Path]]] = {}
    index = re.compile(
        rf"{stem}(?:\.(?P<a>[\w-]+))?\.safetensors\.index(?:\.(?P<b>[\w-]+))?\.json|"
        rf"{stem}(?:\.(?P<c>[\w-]+))?\.safetensors"
    )
    for path in sorted(folder.glob(f"{stem}*")):
        match = index.fullmatch(path.name)
        if match and path.is_file() and not re.search(r"-\d+-of-\d+$", match["c"] or ""):
            name = match["a"] or match["b"] or match["c"] or ""
            if path.suffix == ".json":
                found.setdefault(name, partial(_shards, path))
            else:
                found[name] = partial(list, [path])
    return found


def pickle_refusal(path: Path) -> str:
    """Explain why a pickle does not load, and what to do."""
    return (
        f"{path}: a pickle checkpoint can run any code when it is opened, so it is refused; get "
        "the model's safetensors version, or convert it where that code may run."
    )


def _shards(index: Path) -> list[Path]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{index}: it has no weight_map.")
    names = sorted({str(name) for name in mapping.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name!r:.80} is not the name of a safetensors file.")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}: no such file, but {index.name} lists it.")
    return [index.parent / name for name in names]


class WeightFiles:
    """The opened safetensors of one network: shapes at once, values on demand.

    Args:
        files: as `weight_files` lists them.
        rename: maps a stored name to the network's, or to None for what it does not need.

    Raises:
        UserError: a file is not safetensors, is cut short, or repeats a name.
    """

    def __init__(
        self, files: Iterable[Path], rename: Callable[[str], str | None] = lambda name: name
    ) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.metadata: dict[str, str] = {}
        self._source: dict[str, tuple[Path, str]] = {}
        self._open = {path: _open(path) for path in files}
        for path, file in self._open.items():
            self.metadata |= file.metadata() or {}
            for stored in file.keys():  # noqa: SIM118 (not a dict)
                name = rename(stored)
                if name is None:
                    continue
                if name in self.shapes:
                    raise UserError(f"{path}: tensor {stored} is there twice.")
                self.shapes[name] = tuple(file.get_slice(stored).get_shape())
                self._source[name] = (path, stored)

    def share(self, one: str, other: str) -> None:
        """Give a tensor that is stored under one of two names to both."""
        for stored, name in ((one, other), (other, one)):
            if stored in self.shapes and name not in self.shapes:
                self.shapes[name] = self.shapes[stored]
                self._source[name] = self._source[stored]

    def include(self, other: "WeightFiles") -> None:
        """Take in the tensors of another, none of whose names is here."""
        self.shapes |= other.shapes
        self._source |= other._source
        self._open |= other._open

    def _tensor(self, name: str) -> Tensor:
        path, stored = self._source[name]
        try:
            return self._open[path].get_tensor(stored)
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{path}: tensor {stored}: {first_line(error)}") from error

    def number(self, name: str) -> float:
        """The one number in a tensor, of whatever type.

        Raises:
            UserError: the tensor does not hold exactly one number, or it is not finite.
        """
        if math.prod(self.shapes[name]) != 1 or not math.isfinite(value := self._tensor(name)):
            raise UserError(f"{self._source[name][0]}: {name} is not one finite number.")
        return float(value)

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """One tensor, converted.

        Raises:
            UserError: it is not of floating point, or not finite in that precision.
        """
        path, stored = self._source[name]
        mapped = self._tensor(name)
        if not mapped.is_floating_point():
            raise UserError(f"{path}: tensor {stored} holds {mapped.dtype}, not floating point.")
        tensor = mapped.to(device=device, dtype=dtype)
        if tensor is not mapped:
            let_go_of_pages(mapped.data_ptr(), mapped.nbytes)
        if not all_finite(tensor):
            raise UserError(f"{path}: tensor {stored} holds NaN or infinity (as {dtype}).")
        return tensor


def all_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity.

    A sum, which each of them spoils, takes a fifteenth of the time of a look at each value.
    """
    if bool(torch.isfinite(tensor.sum())):  # of float32 where they are halves, without a copy
        return True
    return bool(torch.isfinite(tensor).all())  # a sum of finite values can be too large


def _open(path: Path):  # the handle's type is not exported
    if path.suffix.lower() in PICKLES:
        raise UserError(pickle_refusal(path))
    try:
        open_regular(path).close()  # a pipe would be waited for
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}.") from error
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: damaged or cut short ({first_line(error)}); get the file again."
        ) from error


class _WithoutMemory(TorchFunctionMode):
    """Allocate new parameters on the meta device; computed buffers stay real."""

    _makers = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in self._makers:
            kwargs["device"] = "meta"
        # First values of what has no memory; to draw them would import torch._dynamo, for a second.
        if getattr(func, "__module__", None) == "torch.nn.init":
            tensor = kwargs.get("tensor", args[0] if args else None)
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def build(make: Callable[[], Network], name: str, files: WeightFiles, layers: int) -> Network:
    """A network without memory, whose tensors are those of the files by name and shape.

    Args:
        make: builds the network.
        name: the name of its config file, for messages.
        files: its weights.
        layers: a lower bound of the layers that the config asks for.

    Raises:
        UserError: the config describes no network, or one that is not in the files.
    """
    if layers > len(files.shapes):
        raise UserError(
            f"{name}: it asks for {layers} layers, but the weights are only "
            f"{len(files.shapes)} tensors."
        )
    try:
        with _WithoutMemory():
            network = make()
    except Exception as error:  # builders raise nearly anything on a nonsensical config
        raise UserError(f"{name}: it describes no network ({first_line(error)}).") from error
    _compare({key: tuple(t.shape) for key, t in network.state_dict().items()}, files.shapes, name)
    return network


def _compare(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], name: str
) -> None:
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise UserError(f"{name}: {_some(missing)} not in the weights.")
    extra = sorted(found.keys() - wanted.keys())
    if extra:
        raise UserError(f"{name}: {_some(extra)} in the weights, but not in this network.")
    for key, shape in wanted.items():
        if shape != found[key]:
            raise UserError(
                f"{name}: tensor {key} should be {list(shape)}, but is {list(found[key])} in the "
                "weights."
            )


def _some(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more) is" if len(names) > 1 else " is")


def fill(network: Network, files: WeightFiles, dtype: torch.dtype, device: torch.device) -> Network:
    """Give a network of `build` its values; it is left frozen, in evaluation mode.

    Raises:
        UserError: a tensor is not finite, or else one that the network cannot have.
    """
    values = {name: files.read(name, dtype, device) for name in network.state_dict()}
    network.load_state_dict(values, assign=True)
    if callable(check := getattr(network, "check_values", None)):
        check()
    if callable(tie := getattr(network, "tie_weights", None)):
        tie()  # transformers has networks with one tensor under two names
    return network.to(device).eval().requires_grad_(False)


def may_replace(path: Path, kind: str, recognise: Callable[[Path], object]) -> bool:
    """True for a path where something of a kind is already; False where there is nothing.

    Args:
        kind: for the message, such as "a model file".
        recognise: raises a UserError for what is of another kind.

    Raises:
        UserError: something else is there, which nobody asked to replace.
    """
    if not os.path.lexists(path):
        return False
    try:
        if path.is_file() or path.is_dir():  # of a pipe or a device nothing is read
            recognise(path)
            return True
    except (UserError, OSError):
        pass
    raise UserError(f"{path}: it is there already and not {kind}, so it stays; name another.")


def save_tensors(
    values: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], *, replace: bool
) -> None:
    """Write one safetensors file, and the folders above it; see `latentdiff.files.writing`.

    Raises:
        UserError: it cannot be written, or a value is not finite.
    """
    _check_finite(values, path.name)
    make_folder(path.parent)
    with writing(path, replace=replace) as stage:
        write_tensors(values, stage, {"format": "pt", **metadata})


def save_weights(values: Mapping[str, Tensor], stage: Path, dtype: torch.dtype | None) -> None:
    """Write the weights of a network into the folder of it that is staged.

    Raises:
        UserError: one is not finite in that precision.
    """
    converted = {
        key: value.detach().to("cpu", dtype or value.dtype) for key, value in values.items()
    }
    _check_finite(converted, stage.parent.name)
    write_tensors(converted, stage, {"format": "pt"})


def write_tensors(
    values: Mapping[str, Tensor], stage: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file where `latentdiff.files` staged it."""
    whole = {key: value.contiguous() for key, value in values.items()}
    save_file(whole, stage, None if metadata is None else dict(metadata))


def _check_finite(values: Mapping[str, Tensor], name: str) -> None:
    for key, value in values.items():
        if not all_finite(value):
            raise UserError(f"{name}: {key} is not finite as {value.dtype}.")

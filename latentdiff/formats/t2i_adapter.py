"""T2I-Adapters on disk: folders of diffusers."""

from pathlib import Path

import torch

from latentdiff.errors import UserError
from latentdiff.formats.config_values import check_above_zero, check_types
from latentdiff.formats.location import find_file
from latentdiff.formats.weights import WeightFiles, blaming, build, fill, weight_files
from latentdiff.models.control import AdapterNetwork

_CLASS = "T2IAdapter"
_TYPES = {
    **dict.fromkeys(("in_channels", "num_res_blocks", "downscale_factor"), int),
    "channels": tuple[int, ...],
    "adapter_type": str,
}
_KINDS = ("full_adapter", "full_adapter_xl", "light_adapter")


def is_t2i_adapter(where: str | Path) -> bool:
    """True for a folder whose config describes a T2I-Adapter.

    Raises:
        UserError: nothing is there, or its config is damaged.
    """
    from latentdiff.formats.diffusers_folder import read_config

    path = find_file(where, "ControlNet") / "config.json"
    return path.is_file() and read_config(path).get("_class_name") == _CLASS


def load_t2i_adapter(
    where: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> AdapterNetwork:
    """Read a T2I-Adapter, after checking all of it: names, shapes, finite values.

    Args:
        where: a folder in the diffusers layout (`config.json` and safetensors).
        device: where it shall compute; that of the model saves a copy at each call.
        dtype: precision; likewise.
        variant: weights to take where a folder has several, as "fp16".

    Raises:
        UserError: there is none, or it is damaged or of another kind.
    """
    from diffusers.models.adapter import T2IAdapter

    from latentdiff.formats.diffusers_folder import read_config

    folder = find_file(where, "T2I-Adapter")
    path = folder / "config.json"
    config, name = read_config(path), str(path)
    if config.get("_class_name") != _CLASS:
        raise UserError(f"{name}: it describes {config.get('_class_name')!s:.60}, and no {_CLASS}.")
    told = {key: value for key, value in config.items() if not key.startswith("_")}
    if odd := sorted(told.keys() - _TYPES.keys()):
        raise UserError(f"{name}: {odd[0]:.60} {told[odd[0]]!s:.60} is for another kind of it.")
    check_types(told, _TYPES, name)
    check_above_zero(told, (key for key in _TYPES if key != "adapter_type"), name)
    if told.get("adapter_type", _KINDS[0]) not in _KINDS:
        raise UserError(f"{name}: adapter_type {told['adapter_type']!s:.60} is none of diffusers'.")
    if told.get("in_channels", 3) not in (1, 3):
        raise UserError(f"{name}: in_channels must be 1 or 3, of grey or RGB pictures.")
    files = WeightFiles(weight_files(folder, "diffusion_pytorch_model", variant))
    layers = told.get("num_res_blocks", 2) * len(told.get("channels", ()))
    module = build(lambda: T2IAdapter(**told), name, files, layers)
    with blaming(folder):
        fill(module, files, dtype, torch.device(device))
    return AdapterNetwork(module, folder.name)

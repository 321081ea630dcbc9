"""ControlNets on disk: folders of diffusers, and single files in lllyasviel's or its names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentdiff.errors import UserError
from latentdiff.formats import single_file_configs as infer
from latentdiff.formats import single_file_names as ldm
from latentdiff.formats.diffusers_save import save_diffusers, writing_model
from latentdiff.formats.location import find_file
from latentdiff.formats.single_file import PartFiles
from latentdiff.formats.weights import (
    WeightFiles,
    blaming,
    check_numbers,
    fill,
    first_line,
    may_replace,
    pickle_refusal,
    save_tensors,
    warn_left_out,
)
from latentdiff.models.control import ControlNetwork
from latentdiff.models.controlnet import ControlNet

_HEADER = "latentdiff"


def load_controlnet(
    where: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> ControlNetwork:
    """Read a ControlNet, after checking all of it: names, shapes, finite values.

    Args:
        where: a folder in the diffusers layout (`config.json` and safetensors), or a .safetensors
            file, with `control_model.` before its names, without it, or in the names of diffusers,
            whose config.json is read where it lies beside it.
        device: where it shall compute; that of the model saves a copy at each call.
        dtype: precision; likewise.
        variant: weights to take where a folder has several, as "fp16".

    Raises:
        UserError: there is none, or it is damaged or of another kind.
    """
    path = find_file(where, "ControlNet")
    module, files = _open(path, variant)
    with blaming(path):
        fill(module, files, dtype, torch.device(device))
    return ControlNetwork(module, path.name)


def save_controlnet(
    control: ControlNetwork | ControlNet, where: str | Path, dtype: torch.dtype | None = None
) -> Path:
    """Write a ControlNet: a folder of diffusers, or one .safetensors file in lllyasviel's names.

    Of such files diffusers opens those of Stable Diffusion 1 and 2; those of XL, which have the
    `label_emb` of Stability's files, ComfyUI does. Another one that is there already is replaced,
    and anything else left alone.

    Args:
        control: the network.
        where: the folder to be, or a .safetensors file.
        dtype: dtype of the weights; None keeps theirs.

    Raises:
        UserError: it cannot be written, or something else is there.
    """
    module = control.module if isinstance(control, ControlNetwork) else control
    path = Path(where)
    if path.suffix != ".safetensors" or path.is_dir():
        with writing_model(path, "config.json") as stage:
            save_diffusers(module, stage, dtype)
        return path
    replace = may_replace(path, "a ControlNet", lambda path: _open(path, None))
    table = _table(module.config)
    values = {
        ldm.CONTROL + (ldm.renamed(name, table) or name): value.detach().to("cpu", dtype)
        for name, value in module.state_dict().items()
    }
    config = {"_class_name": ControlNet.diffusers_name, **module.config}
    save_tensors(values, path, {_HEADER: json.dumps(config)}, replace=replace)
    return path


def _open(path: Path, variant: str | None) -> tuple[ControlNet, WeightFiles]:
    from latentdiff.formats import diffusers_folder as parts

    if path.is_dir():
        return parts.controlnet(path, variant)
    if path.suffix != ".safetensors":
        raise UserError(pickle_refusal(path))
    with blaming(path):
        stored = WeightFiles([path])
        if "lora_controlnet" in stored.shapes:
            raise UserError("it is a Control-LoRA; a whole ControlNet is needed.")
        if "controlnet_cond_embedding.conv_in.weight" in stored.shapes:
            beside = path.parent / "config.json"
            if beside.is_file():
                config = parts.read_config(beside)
                return parts.controlnet_of(config, str(beside), stored), stored
            config = infer.control_config(_original_names(stored.shapes), "")
            return parts.controlnet_of(config, "controlnet", stored), stored
        prefix = ldm.CONTROL if any(n.startswith(ldm.CONTROL) for n in stored.shapes) else ""
        if f"{prefix}input_hint_block.0.weight" not in stored.shapes:
            raise UserError("it holds no ControlNet (control_model.*).")
        config = _config(stored, prefix)
        files = PartFiles(path, [prefix], _table(config))
        warn_left_out(path, [name for name in stored.shapes if not name.startswith(prefix)])
        return parts.controlnet_of(config, "controlnet", files), files


def _original_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a file in the names of diffusers, by those that its table gives them."""
    part = infer.Shapes(shapes, "")
    levels = part.count("down_blocks.{}.resnets.0.conv1.weight")
    attention = [f"down_blocks.{n}.attentions.0.proj_in.weight" in part for n in range(levels)]
    layers = part.count("down_blocks.0.resnets.{}.conv1.weight")
    embedding = part.count("controlnet_cond_embedding.blocks.{}.weight") // 2 + 1
    table = ldm.control_table(layers, attention, embedding)
    return {ldm.renamed(name, table) or name: shape for name, shape in shapes.items()}


def _config(stored: WeightFiles, prefix: str) -> dict[str, Any]:
    """The config in a header that was written here, or what the shapes say."""
    if _HEADER not in stored.metadata:
        return infer.control_config(stored.shapes, prefix)
    try:
        config = json.loads(stored.metadata[_HEADER])
    except (ValueError, RecursionError) as error:
        raise UserError(f"its header is damaged ({first_line(error)}).") from error
    if not isinstance(config, dict):
        raise UserError("its header is damaged: it is no JSON object.")
    check_numbers(config, "header")
    return config


def _table(config: dict[str, Any]) -> ldm.Table:
    """The names of a ControlNet in a single file.

    Raises:
        UserError: its layers have no names there.
    """
    layers, blocks = config.get("layers_per_block"), config.get("down_block_types")
    embedding = config.get("conditioning_embedding_out_channels")
    lists = isinstance(blocks, list | tuple) and isinstance(embedding, list | tuple)
    if not isinstance(layers, int) or not lists:
        raise UserError("a single file has no names for layers that differ in number.")
    assert isinstance(blocks, list | tuple)
    assert isinstance(embedding, list | tuple)
    return ldm.control_table(layers, ["CrossAttn" in str(b) for b in blocks], len(embedding))

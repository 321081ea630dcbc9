"""LoRA files: the layout of diffusers and peft, and kohya's, which A1111 and ComfyUI read too."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.errors import UserError
from latentdiff.formats.embeddings import BUNDLED, packed_words
from latentdiff.formats.weights import (
    WeightFiles,
    blaming,
    may_replace,
    pickle_refusal,
    save_tensors,
)
from latentdiff.lora.factors import PARTS, Factors, Lora, Part, fitting, layers, network
from latentdiff.registry import check_name

Layout = Literal["diffusers", "kohya"]

FILE_NAME = "pytorch_lora_weights.safetensors"

_LARGEST_ALPHA = 1e6
_METADATA = "lora_adapter_metadata"
_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}

# name.lora_A.weight as peft writes it, name.lora.down.weight and name_lora.down.weight as older
# versions of diffusers did, name.lora_linear_layer.down.weight for text encoders.
_DIFFUSERS_KEY = re.compile(
    r"(?P<part>unet|text_encoder)\.(?P<module>.+?)"
    r"(?:(?:\.lora|_lora|\.lora_linear_layer)\.(?P<old>down|up)|\.lora_(?P<new>[AB]))\.weight"
    r"|(?P<alpha_part>unet|text_encoder)\.(?P<alpha_module>.+)\.alpha"
)
_KOHYA_KEY = re.compile(
    r"lora_(?P<part>unet|te1?)_(?P<module>\w+)\.(?P<kind>lora_down\.weight|lora_up\.weight|alpha)"
)
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

Key = tuple[Part, str, Literal["down", "up", "alpha"]]


def load_lora(path: str | Path, bundle: Bundle) -> Lora:
    """Read a LoRA in either layout, and check it against the model it is to change.

    Args:
        path: a .safetensors file, or a folder with `pytorch_lora_weights.safetensors`.
        bundle: the model.

    Raises:
        UserError: missing, damaged, no LoRA, or one for another model.
    """
    file = _find(Path(path).expanduser())
    with blaming(file):
        stored = WeightFiles([file])
        if not stored.shapes:
            raise UserError("it is empty.")
        names = [name for name in stored.shapes if not name.startswith(BUNDLED)]
        keys = {_key(name): name for name in names}
        if len(keys) != len(names):
            raise UserError("a tensor is there twice, under two names.")
        known = {part: _known_layers(network(bundle, part)) for part in PARTS}
        alphas = _declared_alphas(stored.metadata)
        found: dict[Part, dict[str, Factors]] = {part: {} for part in PARTS}
        for (part, module, kind), name in keys.items():
            if kind != "down":
                if (part, module, "down") not in keys:
                    raise UserError(f"{name} is there without its other half.")
                continue
            if (layer := known[part].get(module.replace(".", "_"))) is None:
                raise UserError(f"{name}: no such layer; the LoRA was made for another model.")
            if (part, module, "up") not in keys:
                raise UserError(f"{name} is there without its other half.")
            for half in ("down", "up"):
                if len(stored.shapes[keys[part, module, half]]) not in (2, 4):
                    raise UserError(f"{keys[part, module, half]}: its shape is not a LoRA's.")
            down, up = (
                stored.read(keys[part, module, half], torch.float32, torch.device("cpu"))
                for half in ("down", "up")
            )
            told = keys.get((part, module, "alpha"))
            alpha = alphas(part, layer[0], len(down)) if told is None else stored.number(told)
            found[part][layer[0]] = fitting(name, Factors(down, up, alpha), layer[1])
        words = packed_words(list(stored.shapes))
        return Lora(found["unet"], found["text_encoder"], stored.metadata, words)


def default_name(path: str | Path) -> str:
    """Derive the default name of a LoRA from its file or folder."""
    where = Path(path)
    return re.sub(r"[^A-Za-z0-9_-]", "_", where.name if where.is_dir() else where.stem)[:64]


def _find(path: Path) -> Path:
    try:
        if path.is_dir():
            path /= FILE_NAME
        if not path.is_file():
            raise UserError(f"{path}: no such LoRA file.")
    except OSError as error:
        raise UserError(f"{path!s:.200}: {error.strerror or error}.") from error
    if path.suffix in (".bin", ".ckpt", ".pt", ".pth"):
        raise UserError(pickle_refusal(path))
    return path


def _key(stored: str) -> Key:
    """Parse a stored name; the module's name comes without the prefix of older CLIP models."""
    if match := _KOHYA_KEY.fullmatch(stored):
        part: Part = "unet" if match["part"] == "unet" else "text_encoder"
        module = match["module"]
        kind = match["kind"].removeprefix("lora_").removesuffix(".weight")
    elif match := _DIFFUSERS_KEY.fullmatch(stored.replace(".processor.", ".")):
        part = "unet" if (match["part"] or match["alpha_part"]) == "unet" else "text_encoder"
        module = match["module"] or match["alpha_module"]
        kind = match["old"] or {"A": "down", "B": "up", None: "alpha"}[match["new"]]
        if "_lora." in stored:
            module = _renamed(part, module)
    elif stored.startswith(("lora_te2_", "text_encoder_2.", "transformer.")):
        raise UserError(f"{stored} is of Stable Diffusion XL or newer, which does not load here.")
    else:
        raise UserError(f"{stored} is not of a plain LoRA, in the layout of diffusers or kohya.")
    if part == "text_encoder":
        module = module.removeprefix("text_model.").removeprefix("text_model_")
    return part, module, "down" if kind == "down" else "up" if kind == "up" else "alpha"


def _renamed(part: Part, module: str) -> str:
    """Old attention processors had names of their own for the layers."""
    parent, _, last = module.rpartition(".")
    if part == "text_encoder":
        last = _OLD_TEXT_NAMES.get(last, last)
    return f"{parent}.{'to_out.0' if last == 'to_out' else last}"


def _known_layers(model: nn.Module) -> dict[str, tuple[str, nn.Linear | nn.Conv2d]]:
    """Name and layer, by the name with underscores only, which is all that kohya's files tell."""
    return {name.replace(".", "_"): (name, layer) for name, layer in layers(model).items()}


def _declared_alphas(metadata: Mapping[str, str]) -> Callable[[Part, str, int], float]:
    """alpha of each module by the metadata that diffusers writes; without, alpha is the rank."""
    config: object = {}
    if _METADATA in metadata:
        try:
            config = json.loads(metadata[_METADATA])
        except (ValueError, RecursionError) as error:
            raise UserError(f"its {_METADATA} is not valid JSON.") from error
    if not isinstance(config, dict):
        raise UserError(f"its {_METADATA} is no JSON object.")
    for key, value in config.items():
        if key.endswith((".use_dora", ".lora_bias")) and value:
            raise UserError(f"it was trained with {key}; only plain LoRA works here.")

    def alpha(part: Part, module: str, rank: int) -> float:
        patterns = config.get(f"{part}.alpha_pattern") or {}
        value = config.get(f"{part}.lora_alpha", rank)
        for pattern, given in patterns.items() if isinstance(patterns, dict) else ():
            # As peft matches them; but never as a regular expression, which a hostile file could
            # make run for ages.
            plain = str(pattern).lstrip("^").replace("\\", "").removeprefix("text_model.")
            if module == plain or (pattern[:1] != "^" and module.endswith(f".{plain}")):
                value = given
                break
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{module}: its alpha is {value!s:.40}, not a number.")
        if not abs(value) <= _LARGEST_ALPHA:
            raise UserError(f"{module}: its alpha is too large or not a number.")
        return float(value) * (math.sqrt(rank) if config.get(f"{part}.use_rslora") else 1.0)

    return alpha


def save_lora(
    lora: Lora,
    path: str | Path,
    *,
    layout: Layout = "diffusers",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a LoRA: all of it, or nothing.

    A file that `load_lora` takes for a LoRA, by the names of its tensors, is replaced.

    Args:
        lora: the result of `lora_of` or `load_lora`.
        path: the file to be. `StableDiffusionPipeline.load_lora_weights` looks in a folder for
            `pytorch_lora_weights.safetensors`.
        layout: "diffusers" (peft's names), or "kohya", for A1111 and ComfyUI.
        metadata: further text for the file's header.

    Raises:
        UserError: it cannot be written, holds nothing or values that are not finite, or something
            that is no LoRA is there.
    """
    check_name("LoRA layout", layout, get_args(Layout))
    if not lora.unet and not lora.text_encoder:
        raise UserError("the LoRA changes nothing, so there is nothing to save.")
    path = Path(path).expanduser()
    replace = may_replace(path, "a LoRA that opens here", _recognise)
    write = _kohya if layout == "kohya" else _diffusers
    values, header = write(lora)
    save_tensors(values, path, {**header, **(metadata or {})}, replace=replace)
    return path


def _recognise(path: Path) -> None:
    """Check that every tensor of a file belongs to a LoRA, whatever its model.

    Raises:
        UserError: the file is no LoRA.
    """
    names = WeightFiles([path]).shapes
    if not names:
        raise UserError("it is empty.")
    for name in names:
        if not name.startswith(BUNDLED):
            _key(name)


def _diffusers(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    values: dict[str, Tensor] = {}
    config: dict[str, object] = {}
    for part, factors in lora.parts():
        for module, pair in factors.items():
            # What train_dreambooth_lora.py of diffusers writes for each.
            form = "unet.{}.lora_{}.weight"
            halves = "A", "B"
            if part == "text_encoder":
                form = "text_encoder.text_model.{}.lora_linear_layer.{}.weight"
                halves = "down", "up"
            values[form.format(module, halves[0])] = pair.down
            values[form.format(module, halves[1])] = pair.up
        config |= {f"{part}.{key}": value for key, value in peft_settings(factors).items()}
    return values, {_METADATA: json.dumps(config, sort_keys=True)}


def peft_settings(factors: Mapping[str, Factors]) -> dict[str, object]:
    """The arguments of a `peft.LoraConfig` for these modules."""
    rank = _commonest([pair.rank for pair in factors.values()])
    alpha = _commonest([pair.alpha for pair in factors.values()])
    return {
        "r": int(rank),
        "lora_alpha": alpha,
        "rank_pattern": {n: p.rank for n, p in factors.items() if p.rank != rank},
        "alpha_pattern": {n: p.alpha for n, p in factors.items() if p.alpha != alpha},
        "target_modules": sorted(factors),
    }


def _commonest(values: list[int] | list[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _kohya(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    values: dict[str, Tensor] = {}
    pairs: list[Factors] = []
    for part, factors in lora.parts():
        pairs += factors.values()
        for module, pair in factors.items():
            full = f"text_model.{module}" if part == "text_encoder" else module
            name = _KOHYA[part] + full.replace(".", "_")
            values[f"{name}.lora_down.weight"] = pair.down
            values[f"{name}.lora_up.weight"] = pair.up
            values[f"{name}.alpha"] = torch.tensor(pair.alpha)
    return values, {
        "ss_network_module": "networks.lora",
        "ss_network_dim": f"{_commonest([pair.rank for pair in pairs]):g}",
        "ss_network_alpha": f"{_commonest([pair.alpha for pair in pairs]):g}",
    }

"""LoRA files: read in any layout of `lora.layouts`, written in diffusers' or in kohya's."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.errors import UserError, warn
from latentdiff.files import writing
from latentdiff.formats import single_file_names as ldm
from latentdiff.formats.embeddings import BUNDLED, packed_words
from latentdiff.formats.location import expanded
from latentdiff.formats.weights import (
    WeightFiles,
    blaming,
    may_replace,
    read_json,
    save_tensors,
)
from latentdiff.lora.changes import Decomposed, LowRank, decomposed, hadamard, kronecker
from latentdiff.lora.factors import (
    MAX_RANK,
    PARTS,
    Change,
    Factors,
    Lora,
    Part,
    fitting,
    fitting_sum,
    layers,
    network,
    norms,
    parts_of,
)
from latentdiff.lora.layouts import (
    HADAMARD,
    KRONECKER,
    NORMS,
    SECOND,
    SPELLINGS,
    TRANSFORMER,
    Kind,
    Spelling,
    parse,
)
from latentdiff.reading import parse_json
from latentdiff.registry import check_name

Layout = Literal["diffusers", "kohya", "peft"]

FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")

_LARGEST_ALPHA = 1e6
_SYNTAX = re.compile(r"[][\\^$|*+?(){}]")
_MOST_REGEXES, _MOST_REPEATS, _LONGEST_REGEX = 32, 2, 200
_METADATA = "lora_adapter_metadata"
_PEFT_CONFIG = "adapter_config.json"
_DIFFUSERS, _DIFFUSERS_TEXT, _PEFT, _KOHYA, _SUMS = (
    next(spelling for spelling in SPELLINGS if spelling.name.startswith(name))
    for name in ("diffusers", "diffusers, text", "peft", "kohya", "sums")
)
# Settings of peft that make more of a file than W + alpha / rank * up @ down.
_REFUSED = (
    *("lora_bias", "use_qalora", "use_bdlora", "layer_replication", "arrow_config"),
    *("kasa_config", "monteclora_config", "alora_invocation_tokens", "trainable_token_indices"),
    *("modules_to_save", "target_parameters"),
)
_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")

_HALVES: tuple[Kind, ...] = ("down", "up", "mid")
_ADDED: tuple[tuple[Kind, str], ...] = (("diff", "weight"), ("diff_b", "bias"))

Layer = nn.Linear | nn.Conv2d
Known = Mapping[Part, Mapping[str, tuple[str, nn.Module]]]
Kinds = dict[Kind, str]


def load_lora(path: str | Path, bundle: Bundle) -> Lora:
    """Read a LoRA in any layout, and check it against the model it is to change.

    Args:
        path: a .safetensors file, or a folder with `pytorch_lora_weights.safetensors` or peft's
            `adapter_model.safetensors`.
        bundle: the model.

    Raises:
        UserError: missing, damaged, no LoRA, or one for another model.
    """
    file = _find(expanded(path))
    with blaming(file):
        stored = WeightFiles([file])
        _check_layers(stored)
        known: Known = {part: _known_layers(network(bundle, part)) for part in parts_of(bundle)}
        settings = _settings(file, stored.metadata)
        alphas = _declared_alphas(settings)
        changes: dict[Part, dict[str, Change]] = {part: {} for part in PARTS}
        factors: dict[Part, dict[str, Factors]] = {part: {} for part in PARTS}
        sums: dict[Part, dict[str, Tensor]] = {part: {} for part in PARTS}
        for (part, module), names in _grouped(stored, known).items():
            layer = known[part][module.replace(".", "_")][1]
            norms_of: Kinds = {kind: names.pop(kind) for kind in NORMS if kind in names}
            found = _lycoris(stored, names, (part, module), layer, settings, alphas)
            if (change := _change(stored, names, layer)) is not None:
                down, up, alpha = change
                strength = alphas(part, module, len(down)) if alpha is None else alpha
                name = names.get("down") or names["diff"]
                assert isinstance(layer, Layer)
                factors[part][module] = fitting(name, Factors(down, up, strength), layer)
            if norms_of:
                if found is None and module in factors[part]:
                    found = LowRank(factors[part].pop(module))
                found = _dora(stored, norms_of, found, layer)
            elif settings.get(f"{part}.use_dora") and module in factors[part]:
                raise UserError(f"{module}: its settings say use_dora, but it has no norms.")
            if found is not None:
                changes[part][module] = found
            for kind, end in _ADDED:
                if kind in names and not (kind == "diff" and isinstance(layer, Layer)):
                    value = _read(stored, names[kind])
                    sums[part][f"{module}.{end}"] = fitting_sum(names[kind], value, layer, end)
        words = packed_words(list(stored.shapes))
        names = kohya_names(bundle)
        return Lora(
            **factors,
            metadata=stored.metadata,
            words=words,
            sums=sums,
            ldm=names,
            changes=changes,
        )


def _lycoris(
    stored: WeightFiles,
    names: Kinds,
    place: tuple[Part, str],
    layer: nn.Module,
    settings: Mapping[str, object],
    alphas: Callable[[Part, str, int], float],
) -> Change | None:
    """The LoHa or LoKr of a layer, whose names are taken out; None if there is none.

    Raises:
        UserError: it is none for this layer.
    """
    kinds: list[Kind] = [kind for kind in (*HADAMARD, *KRONECKER) if kind in names]
    if not kinds:
        return None
    name, (part, module) = names[kinds[0]], place
    mixed = {"down", "up", "mid", "diff"} & names.keys() or {kind[:4] for kind in kinds} == _BOTH
    if mixed or not isinstance(layer, Layer):
        raise UserError(f"{name}: this layer cannot have it.")
    shape = tuple(layer.weight.shape)
    parts: dict[str, Tensor] = {kind: _read(stored, names.pop(kind)) for kind in kinds}
    alpha = _alpha(stored, names)
    names.pop("alpha", None)
    ranks = [len(parts[k]) for k in ("hada_w1_b", "lokr_w1_b", "lokr_w2_b") if k in parts]
    told = settings.get(f"{part}.r")
    if ranks:
        rank = max(1, ranks[0])
        scale = (alphas(part, module, rank) if alpha is None else alpha) / rank
    elif alpha is None and isinstance(told, int) and told > 0:  # by peft's rule
        if settings.get(f"{part}.rank_pattern"):
            raise UserError(f"{name}: its rank_pattern is not read for whole factors.")
        scale = alphas(part, module, told) / told
    else:  # by that of LyCORIS
        scale = 1.0
    return (hadamard if kinds[0] in HADAMARD else kronecker)(parts, scale, shape, name)


_BOTH = {"hada", "lokr"}


def _dora(stored: WeightFiles, names: Kinds, inside: Change | None, layer: nn.Module) -> Change:
    """The DoRA around a change."""
    kind, name = next(iter(names.items()))
    if inside is None or len(names) > 1 or not isinstance(layer, Layer):
        raise UserError(f"{name}: there are norms of a DoRA without a change of the weight.")
    shape = tuple(layer.weight.shape)
    return decomposed(inside, _read(stored, name), shape, name, outputs=kind == "magnitude")


def _grouped(stored: WeightFiles, known: Known) -> dict[tuple[Part, str], Kinds]:
    """The tensors of each layer, by the layer's own name.

    Raises:
        UserError: a tensor is of no layer of the model, or is there twice.
    """
    groups: dict[tuple[Part, str], Kinds] = {}
    second = next((name for name in stored.shapes if name.startswith(SECOND)), None)
    if second is not None and "text_encoder_2" not in known:
        raise UserError(f"{second} is of Stable Diffusion XL, and this model is not.")
    other = next((name for name in stored.shapes if name.startswith(TRANSFORMER)), None)
    if other is not None and "transformer" not in known:
        raise UserError(f"{other} is of a transformer, and this model has a U-Net.")
    for name in stored.shapes:
        if name.startswith(BUNDLED):
            continue
        parsed = parse(name)
        places: list[tuple[Part, str]]
        places = [place for place in parsed.places() if place[1] in known.get(place[0], ())]
        if not places:
            raise UserError(f"{name}: no such layer; the LoRA was made for another model.")
        part, module = places[0]
        place = part, known[part][module][0]
        if parsed.kind in groups.setdefault(place, {}):
            raise UserError(f"{name}: a tensor is there twice, under two names.")
        groups[place][parsed.kind] = name
    return groups


def _change(
    stored: WeightFiles, names: Kinds, layer: nn.Module
) -> tuple[Tensor, Tensor, float | None] | None:
    """Down, up and alpha of a layer's weight; None if it stays. Without an alpha it is None.

    Raises:
        UserError: a half is missing, or is nothing that this layer has.
    """
    halves = [names[kind] for kind in _HALVES if kind in names]
    for name in halves:
        if len(stored.shapes[name]) not in (2, 4):
            raise UserError(f"{name}: its shape is not a LoRA's.")
    if not halves:
        if "diff" in names and isinstance(layer, Layer):
            down, up = _whole(_read(stored, names["diff"]), names["diff"], layer)
            return down, up, float(len(down))
        if names.keys() == {"alpha"}:
            raise UserError(f"{names['alpha']} is there without its other half.")
        return None
    if not {"down", "up"} <= names.keys():
        raise UserError(f"{halves[0]} is there without its other half.")
    if "diff" in names or not isinstance(layer, Layer):
        raise UserError(f"{names['down']}: this layer cannot have it.")
    down, up = _read(stored, names["down"]), _read(stored, names["up"])
    if "mid" in names:
        down = _tucker(down, _read(stored, names["mid"]), names["mid"], layer)
    return down, up, _alpha(stored, names)


def _alpha(stored: WeightFiles, names: Kinds) -> float | None:
    """The alpha of a layer; None where there is none."""
    alpha = stored.number(names["alpha"]) if "alpha" in names else None
    if alpha is not None and not abs(alpha) <= _LARGEST_ALPHA:
        raise UserError(f"{names['alpha']}: its alpha is too large.")
    return alpha


def _whole(change: Tensor, name: str, layer: Layer) -> tuple[Tensor, Tensor]:
    """A whole change of a weight as factors, one of which is the identity; alpha is their rank."""
    if change.numel() != layer.weight.numel() or len(change) != len(layer.weight):
        raise UserError(
            f"{name} should be {list(layer.weight.shape)}, but is {list(change.shape)}; "
            "the LoRA was made for another model."
        )
    change = change.reshape(layer.weight.shape)
    outside, inside = change.shape[:2]
    if change.ndim == 2 and inside < outside:
        return torch.eye(inside), change
    return change, torch.eye(outside)


def _tucker(down: Tensor, mid: Tensor, name: str, layer: Layer) -> Tensor:
    """`mid` [R, r, k, k] after `down` [r, in, 1, 1]: one kernel [R, in, k, k]."""
    fits = mid.ndim == 4 and mid.shape[1] == len(down) and down[0, 0].numel() == 1
    if not fits or down.shape[1] != layer.weight.shape[1] or len(mid) > MAX_RANK:
        raise UserError(f"{name}: its shape is not that of a LoCon in Tucker form.")
    return torch.einsum("Rrkl,ri->Rikl", mid, down.flatten(1))


def _read(stored: WeightFiles, name: str) -> Tensor:
    return stored.read(name, torch.float32, torch.device("cpu"))


def is_lora(path: str | Path) -> bool:
    """Tell whether a file or folder holds nothing but tensors of a LoRA, by their names."""
    try:
        recognise(_find(expanded(path)))
    except UserError:
        return False
    return True


def convert_lora(
    path: str | Path, out: Path, bundle: Bundle, layout: Layout, dtype: torch.dtype | None
) -> Path:
    """Write a LoRA file anew in a layout.

    Args:
        path: a LoRA in any layout.
        out: the file to be.
        bundle: the model that it was made for.
        layout: see `save_lora`.
        dtype: likewise.

    Raises:
        UserError: no LoRA, or one for another model; or `out` cannot be written.
    """
    lora = load_lora(path, bundle)
    if lora.words:
        warn(f"{path}: the learned words {', '.join(lora.words)} in it are left out.")
    own = ("format", _METADATA, "ss_network_module", "ss_network_dim", "ss_network_alpha")
    kept = {name: text for name, text in lora.metadata.items() if name not in own}
    return save_lora(lora, out, layout=layout, dtype=dtype, metadata=kept)


def default_name(path: str | Path) -> str:
    """Derive the default name of a LoRA from its file or folder."""
    where = Path(path)
    return name_of(where.name if where.is_dir() else where.stem)


def name_of(words: str) -> str:
    """The name of a LoRA in a model, out of any words."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", words)[:64]


def _find(path: Path) -> Path:
    try:
        if path.is_dir():
            path = next(
                (path / n for n in FILE_NAMES if (path / n).is_file()), path / FILE_NAMES[0]
            )
        if not path.is_file():
            raise UserError(f"{path}: no such LoRA file.")
    except OSError as error:
        raise UserError(f"{path!s:.200}: {error.strerror or error}.") from error
    return path


def _known_layers(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Name and layer, by its name and by latent-diffusion's with underscores only."""
    known = {**layers(model), **norms(model)}
    found = {name.replace(".", "_"): (name, layer) for name, layer in known.items()}
    return found | {
        other.replace(".", "_"): (name, known[name]) for name, other in ldm_names(model).items()
    }


def kohya_names(bundle: Bundle) -> dict[str, str]:
    """Latent-diffusion's names of the U-Net's layers, where kohya's layout has them: see `Lora`."""
    xl = "text_encoder_2" in bundle.modules
    return ldm_names(bundle.network.module) if xl else {}


def ldm_names(model: nn.Module) -> dict[str, str]:
    """Latent-diffusion's names of a U-Net's layers, by their own; none of other networks."""
    config = getattr(model, "config", None)
    if not isinstance(config, Mapping):
        return {}
    count, blocks = (config.get(key) for key in ("layers_per_block", "down_block_types"))
    if not isinstance(count, int) or not isinstance(blocks, list | tuple):
        return {}
    table = ldm.unet_table(count, ["CrossAttn" in str(block) for block in blocks])
    names = ((name, ldm.renamed(name, table)) for name in {**layers(model), **norms(model)})
    return {name: other for name, other in names if other is not None}


def _settings(file: Path, metadata: Mapping[str, str]) -> Mapping[str, object]:
    """The arguments of peft that a LoRA was trained with, as "unet.r": of the header, and of the
    `adapter_config.json` beside peft's own file.

    Raises:
        UserError: they are damaged, contradict each other, or ask for more than plain LoRA.
    """
    config: object = {}
    own: Mapping[str, object] = {}
    if file.name == FILE_NAMES[1] and (file.parent / _PEFT_CONFIG).is_file():
        own = read_json(file.parent / _PEFT_CONFIG)
    if _METADATA in metadata:
        try:
            config = parse_json(metadata[_METADATA])
        except ValueError as error:
            raise UserError(f"its {_METADATA} is not valid JSON.") from error
    if not isinstance(config, dict):
        raise UserError(f"its {_METADATA} is no JSON object.")
    beside = {f"{part}.{key}": value for key, value in own.items() for part in PARTS}
    for part in PARTS:
        for key in (f"{part}.lora_alpha", f"{part}.alpha_pattern"):
            if key in config and key in beside and config[key] != beside[key]:
                raise UserError(f"its header says another {key} than {_PEFT_CONFIG} beside it.")
    config = beside | config
    for key, value in config.items():
        last = key.rpartition(".")[2]
        refused = (
            (last in _REFUSED and bool(value))
            or (last == "init_lora_weights" and value not in _HARMLESS_STARTS)
            or (last == "peft_type" and value not in ("LORA", "LOHA", "LOKR"))
            or (last == "bias" and value not in ("none", None))
        )
        if refused:
            raise UserError(f"it was trained with {key} = {value!s:.40}, which does not load here.")
    return config


def _declared_alphas(config: Mapping[str, object]) -> Callable[[Part, str, int], float]:
    """alpha of each module by peft's settings; without any it is the rank.

    The rank itself is that of the tensors, whatever `r` and `rank_pattern` say.

    Raises:
        UserError: a pattern of `alpha_pattern` that might take ages to match.
    """
    patterns: dict[Part, list[tuple[Callable[[str], bool], object]]] = {}
    for part in PARTS:
        told = config.get(f"{part}.alpha_pattern") or {}
        if not isinstance(told, dict):
            raise UserError(f"its {part}.alpha_pattern is no JSON object.")
        patterns[part] = [(_matcher(pattern), value) for pattern, value in told.items()]
        if sum(isinstance(matches, _Regex) for matches, _ in patterns[part]) > _MOST_REGEXES:
            raise UserError(f"its {part}.alpha_pattern has more than {_MOST_REGEXES} expressions.")

    def alpha(part: Part, module: str, rank: int) -> float:
        value = config.get(f"{part}.lora_alpha", config.get(f"{part}.alpha", rank))
        value = next((given for matches, given in patterns[part] if matches(module)), value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{module}: its alpha is {short(value)}, not a number.")
        if not abs(value) <= _LARGEST_ALPHA:
            raise UserError(f"{module}: its alpha is too large or not a number.")
        return float(value) * (math.sqrt(rank) if config.get(f"{part}.use_rslora") else 1.0)

    return alpha


@dataclass(frozen=True, slots=True)
class _Regex:
    """A regular expression that cannot take long, matched as `peft.utils.get_pattern_key` does."""

    compiled: re.Pattern[str]

    def __call__(self, module: str) -> bool:
        return self.compiled.match(module) is not None


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Tell whether peft takes a key of `alpha_pattern` for a module: the end of its name, between
    dots, or all of it after "^"; or a regular expression.

    Raises:
        UserError: an expression that might take ages, or is none.
    """
    bare = pattern.removesuffix("$").replace("\\.", ".")
    plain = bare.removeprefix("^").removeprefix("text_model.")
    if not _SYNTAX.search(plain):
        if bare.startswith("^"):
            return plain.__eq__
        return lambda module: f".{module}".endswith(f".{plain}")
    slow = len(re.findall(r"[*+?]", pattern)) > _MOST_REPEATS or re.search(r"[(){}]", pattern)
    if slow or len(pattern) > _LONGEST_REGEX:
        raise UserError(
            f"alpha_pattern: {short(pattern)} might take ages to match; write the names of the "
            "modules in its place."
        )
    try:
        return _Regex(re.compile(rf"(.*\.)?({pattern.replace('text_model.', '')})$"))
    except re.error as error:
        raise UserError(f"alpha_pattern: {short(pattern)} is no expression ({error}).") from error


def save_lora(
    lora: Lora,
    path: str | Path,
    *,
    layout: Layout = "diffusers",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a LoRA: all of it, or nothing.

    A file that `load_lora` takes for a LoRA, by the names of its tensors, is replaced.

    Args:
        lora: the result of `lora_of` or `load_lora`.
        path: the file to be. `StableDiffusionPipeline.load_lora_weights` looks in a folder for
            `pytorch_lora_weights.safetensors`.
        layout: "diffusers" (peft's names), or "kohya", of which A1111 and ComfyUI take every
            tensor; of diffusers' ComfyUI reads no alpha and leaves some layers out. Or "peft", a
            folder with `adapter_model.safetensors`, the path, and `adapter_config.json`, which
            `peft.PeftModel.from_pretrained` opens around one network. The first is whole without
            the second, which is written after it.
        dtype: of the factors in the file; None keeps theirs.
        metadata: further text for the file's header.

    Raises:
        UserError: it cannot be written, holds nothing or values that are not finite, or something
            that is no LoRA is there, or beside it a config of something else.
    """
    check_name("LoRA layout", layout, get_args(Layout))
    if not any([*lora.parts(), *lora.sums.values(), *lora.changes.values()]):
        raise UserError("the LoRA changes nothing, so there is nothing to save.")
    path = expanded(path)
    replace = may_replace(path, "a LoRA that opens here", recognise)
    values, header = {"kohya": _kohya, "diffusers": _diffusers, "peft": _peft}[layout](lora)
    config = header.pop(_PEFT_CONFIG, None)
    if config is not None and path.name != FILE_NAMES[1]:
        raise UserError(f"{path}: peft opens {FILE_NAMES[1]} alone; name it so.")
    beside = path.parent / _PEFT_CONFIG
    renew = config is not None and may_replace(beside, "the config of a LoRA", _recognise_config)
    if dtype is not None:
        values = {n: v if n.endswith(".alpha") else v.to(dtype) for n, v in values.items()}
    save_tensors(values, path, {**header, **(metadata or {})}, replace=replace)
    if config is not None:
        with writing(beside, replace=renew) as stage:
            stage.write_text(config, "utf-8")
    return path


def recognise(path: Path) -> None:
    """Check that every tensor of a file belongs to a LoRA, whatever its model.

    Raises:
        UserError: the file is no LoRA.
    """
    stored = WeightFiles([path])
    _check_layers(stored)
    for name in stored.shapes:
        if not name.startswith(BUNDLED):
            parse(name)


def _recognise_config(path: Path) -> None:
    """Check that a file is peft's config of a LoRA.

    Raises:
        UserError: it is not.
    """
    if read_json(path).get("peft_type") != "LORA":
        raise UserError(f"{path}: it is no config of a LoRA.")


def _check_layers(stored: WeightFiles) -> None:
    """Check that a file holds something beside learned words.

    Raises:
        UserError: it does not.
    """
    if not stored.shapes:
        raise UserError("it is empty.")
    if all(name.startswith(BUNDLED) for name in stored.shapes):
        raise UserError(
            "it holds learned words alone and no LoRA: load it with --embedding, or "
            "`pipe.load_textual_inversion`."
        )


def _diffusers(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `train_dreambooth_lora.py` of diffusers writes each part.

    Raises:
        UserError: it holds what diffusers has no names for.
    """
    values, config = _named_by_peft(lora, _DIFFUSERS, _DIFFUSERS_TEXT)
    return values, {_METADATA: _header(config)}


def _peft(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As peft's own `save_pretrained` writes it, with alpha in the header, too; the config stands
    under its file's name.

    Raises:
        UserError: it is of several networks, or holds what peft's LoRA has no names for.
    """
    values, config = _named_by_peft(lora, _PEFT, _PEFT)
    if len(config) != 1:
        raise UserError("a LoRA of several networks: the layout 'peft' is for one.")
    told = next(iter(config.values())) | {"peft_type": "LORA", "bias": "none"}
    beside = json.dumps(told, indent=2, sort_keys=True) + "\n"
    return values, {_METADATA: _header(config), _PEFT_CONFIG: beside}


def _header(config: Mapping[Part, Mapping[str, object]]) -> str:
    """The arguments of peft for each part, as diffusers has them in a header."""
    told = {f"{part}.{key}": value for part in config for key, value in config[part].items()}
    return json.dumps(told, sort_keys=True)


def _named_by_peft(
    lora: Lora, spelled: Spelling, spelled_text: Spelling
) -> tuple[dict[str, Tensor], dict[Part, dict[str, object]]]:
    """The tensors, and for each part the arguments of peft's LoraConfig.

    Raises:
        UserError: it holds what diffusers has no names for.
    """
    if any(lora.sums.values()):
        raise UserError("it changes norms or biases, which only the layout 'kohya' has names for.")
    values: dict[str, Tensor] = {}
    config: dict[Part, dict[str, object]] = {}
    for part in PARTS:
        plain, norms_of = dict(getattr(lora, part)), _norms_of(lora.changes.get(part, {}))
        if plain and norms_of:
            raise UserError("it has layers with and without DoRA: only the layout 'kohya' does.")
        factors = plain or {module: pair for module, (pair, _) in norms_of.items()}
        if not factors:
            continue
        spelling = spelled_text if part.startswith("text_encoder") else spelled
        for module, pair in factors.items():
            values[spelling.spelled(part, module, "down")] = pair.down
            values[spelling.spelled(part, module, "up")] = pair.up
            if module in norms_of:
                name = spelling.spelled(part, module, "down")
                name = name.removesuffix(spelling.ends["down"]) + ".lora_magnitude_vector"
                values[name] = norms_of[module][1]
        config[part] = peft_settings(factors) | ({"use_dora": True} if norms_of else {})
    return values, config


def _norms_of(changes: Mapping[str, Change]) -> dict[str, tuple[Factors, Tensor]]:
    """Factors and norms of DoRAs, the norms in peft's shape.

    Raises:
        UserError: a change is of another kind, which diffusers has no names for.
    """
    found: dict[str, tuple[Factors, Tensor]] = {}
    for module, change in changes.items():
        if not (
            isinstance(change, Decomposed)
            and isinstance(change.inside, LowRank)
            and change.axis == 0
        ):
            raise UserError(
                "it has layers of LoHa, LoKr or a DoRA over inputs, which only the layout 'kohya' "
                "has names for."
            )
        m = change.magnitude
        m = m.flatten() if m.ndim == 2 else m.transpose(0, 1).contiguous()
        found[module] = change.inside.factors, m
    return found


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
            spelling, module = _kohya_spelling(lora, _KOHYA), _kohya_module(lora, part, module)
            values[spelling.spelled(part, module, "down")] = pair.down
            values[spelling.spelled(part, module, "up")] = pair.up
            values[spelling.spelled(part, module, "alpha")] = torch.tensor(pair.alpha)
    for part, sums in lora.sums.items():
        for name, value in sums.items():
            module, _, end = name.rpartition(".")
            spelling, module = _kohya_spelling(lora, _SUMS), _kohya_module(lora, part, module)
            values[spelling.spelled(part, module, "diff" if end == "weight" else "diff_b")] = value
    for part, changes in lora.changes.items():
        for module, change in changes.items():
            spelling, module = _kohya_spelling(lora, _KOHYA), _kohya_module(lora, part, module)
            stem = spelling.spelled(part, module, "alpha").removesuffix(spelling.ends["alpha"])
            values |= {f"{stem}.{end}": value for end, value in change.tensors().items()}
    if any(lora.changes.values()):
        return values, {"ss_network_module": "lycoris.kohya"}
    if not pairs:
        return values, {}
    return values, {
        "ss_network_module": "networks.lora",
        "ss_network_dim": f"{_commonest([pair.rank for pair in pairs]):g}",
        "ss_network_alpha": f"{_commonest([pair.alpha for pair in pairs]):g}",
    }


def _kohya_module(lora: Lora, part: Part, module: str) -> str:
    return lora.ldm.get(module, module) if part == "unet" else module


def _kohya_spelling(lora: Lora, spelling: Spelling) -> Spelling:
    """The spelling, in which the first of two encoders has a number, too."""
    two = lora.ldm or lora.text_encoder_2
    return replace(spelling, text="lora_te1_text_model_") if two else spelling

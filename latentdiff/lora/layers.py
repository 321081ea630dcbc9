"""LoRAs in a model: put in to train or to draw with, scaled, taken out, fused.

To train, and to draw with on a GPU, they are layers of peft; to draw with on a CPU, sums in the
weights (`latentdiff.lora.sums`).
"""

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.errors import UserError
from latentdiff.lora import sums
from latentdiff.lora.changes import LowRank
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
from latentdiff.lora.file import kohya_names, peft_settings
from latentdiff.lora.training import (
    Kind,
    begin_dora,
    inject_lycoris,
    learned_by,
    parameters_of,
)
from latentdiff.registry import check_name

Network = TypeVar("Network", bound=nn.Module)

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "transformer": (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    ),
    "all": (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
        *("conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj"),
    ),
}
"""Layers of the U-Net by the ends of their names: attention alone (as diffusers' scripts train),
whole transformer blocks (kohya's), or convolutions too (LoCon)."""

_TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def add_lora(
    bundle: Bundle,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: str | Sequence[str] = "attention",
    blocks: Sequence[str] | None = None,
    text_encoder: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    name: str = "lora",
    kind: Kind = "lora",
) -> list[nn.Parameter]:
    """Put a fresh LoRA into a model, to be trained; at first it changes nothing.

    `down` is drawn as He et al. 2015 do, `up` is zero: Hu et al. 2021, sec. 4.1. Everything else
    in the networks it goes into is frozen. What it learned is `lora_of(bundle, name)`.

    Args:
        bundle: the model; its networks are changed in place.
        rank: rank of every factor.
        alpha: its strength is alpha / rank; None: the rank.
        targets: a name of `TARGETS`, or ends of the names of the U-Net's layers.
        blocks: beginnings of the names of the U-Net's layers, as "up_blocks"; None: all of them.
        text_encoder: whether attention in the text encoders, CLIP models, gets one as well.
        dropout: dropout of its inputs, while the networks are in training mode; drawn from
            torch's global random state, as all of torch's dropout is.
        seed: seed of the initial values.
        name: name of the LoRA in the model.
        kind: "lora"; "dora", which learns the norms of weights beside it; "loha" or "lokr", of
            LyCORIS: see `latentdiff.lora.changes`.

    Returns:
        Its parameters in float32, the only ones of those networks that require gradients.

    Raises:
        UserError: a setting is out of range, or no layer has such a name.
    """
    _check_settings(rank, alpha, dropout)
    check_name("kind of LoRA", kind, get_args(Kind))
    if kind in ("loha", "lokr") and dropout:
        raise UserError(f"dropout: a {kind} has none of its inputs; leave it out.")
    if others := lora_names(bundle):
        raise UserError(f"the model has a LoRA already ('{others[0]}'): remove or fuse it first.")
    named = TARGETS.get(targets, (targets,)) if isinstance(targets, str) else targets
    denoiser = cast(Part, bundle.network.part)
    chosen: dict[Part, Sequence[str]] = {denoiser: named}
    for part in parts_of(bundle) if text_encoder else ():
        chosen.setdefault(part, _TEXT_TARGETS)
    random = torch.Generator().manual_seed(seed)
    found: dict[Part, dict[str, Factors]] = {}
    for part, ends in chosen.items():
        matching = {
            module: layer
            for module, layer in layers(network(bundle, part)).items()
            if any(f".{module}".endswith(f".{end}") for end in ends)
            and (part != denoiser or blocks is None or _begins(module, blocks))
        }
        if not matching and part != denoiser:
            raise UserError("only a CLIP text encoder can have a LoRA; leave text_encoder off.")
        if not matching:
            where = "" if blocks is None else f" and begins with {blocks}"
            raise UserError(
                f"targets: no layer of the {part} has a name that ends in {named}{where}."
            )
        strength = float(rank if alpha is None else alpha)
        found[part] = {m: _fresh(layer, rank, strength, random) for m, layer in matching.items()}
    if kind in ("loha", "lokr"):
        _check_lora_name(name)
        for part, pairs in found.items():
            model, strength = network(bundle, part), float(rank if alpha is None else alpha)
            inject_lycoris(model, kind, list(pairs), rank, strength, name, random)
            sums.add(model, name, {})
    else:
        _inject(bundle, Lora(**found), name, torch.float32, dropout, dora=kind == "dora")
    for part in found:
        sums.scale(network(bundle, part), {name: 1.0})
    for part in found:
        network(bundle, part).requires_grad_(False)
    trained: list[nn.Parameter] = []
    for part in parts_of(bundle):
        for _, layer in _lora_layers(network(bundle, part), name):
            trained += parameters_of(layer, name)
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def _begins(module: str, blocks: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{block}.") for block in blocks)


def _check_settings(rank: int, alpha: float | None, dropout: float) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise UserError(f"rank: must be a whole number from 1 to {MAX_RANK}, not {rank!s:.40}.")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha: must be a number above 0, not {alpha}.")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout: must be from 0 to below 1, not {dropout}.")


def _fresh(
    layer: nn.Linear | nn.Conv2d, rank: int, alpha: float, random: torch.Generator
) -> Factors:
    outside, *rest = layer.weight.shape
    down = torch.empty(rank, *rest)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=random)
    return Factors(down, torch.zeros(outside, rank, *([1] * (len(rest) - 1))), alpha)


def attach_lora(bundle: Bundle, lora: Lora, name: str, scale: float = 1.0) -> None:
    """Put a LoRA into a model to draw with, beside those that are in it.

    Like `scale_loras` and `detach_lora` it changes the networks in place, so none of them may be
    called while another thread draws with this model.

    Args:
        bundle: the model.
        lora: a LoRA that `load_lora` read for this model.
        name: name of the LoRA in the model; letters, digits, _ and -.
        scale: its strength; 0 is off, below 0 is away from it.

    Raises:
        UserError: the name is taken or unusable, the scale not finite, or the LoRA of another
            model; the model is as it was.
    """
    if name in lora_names(bundle):
        raise UserError(f"a LoRA named '{name}' is already there; choose another name.")
    _check_scale(name, scale)
    # On a GPU another copy of the weights may not fit; in half precision small changes are lost.
    sums_up = bundle.device.type == "cpu" and bundle.network.dtype == torch.float32
    _inject(bundle, _as_changes(bundle, lora) if sums_up else lora, name, None, 0.0)
    try:
        scale_loras(bundle, {name: scale})
    except UserError:
        detach_lora(bundle, name)
        raise


def _as_changes(bundle: Bundle, lora: Lora) -> Lora:
    """The LoRA with its factors as changes of weights, which hold the sum then."""
    changes: dict[Part, dict[str, Change]] = {part: {**own} for part, own in lora.changes.items()}
    for part, pairs in lora.parts():
        fitted = _fitted(network(bundle, part), pairs)
        own = changes.setdefault(part, {})
        both = fitted.keys() & own.keys()
        both |= {m for m in fitted if f"{m}.weight" in lora.sums.get(part, {})}
        if both:
            raise UserError(f"{min(both)}: the LoRA changes this layer in two ways.")
        own |= {module: LowRank(factors) for module, factors in fitted.items()}
    return Lora(changes=changes, sums=lora.sums)


def _inject(
    bundle: Bundle,
    lora: Lora,
    name: str,
    dtype: torch.dtype | None,
    dropout: float,
    *,
    dora: bool = False,
) -> None:
    """Layers of peft, or sums, with these values; all is checked before anything is changed."""
    _check_lora_name(name)
    fitted: dict[Part, dict[str, Factors]]
    fitted = {part: _fitted(network(bundle, part), pairs) for part, pairs in lora.parts()}
    added: dict[Part, dict[str, Tensor | Change]]
    added = {
        part: _fitted_sums(network(bundle, part), lora.sums.get(part, {}))
        | _fitted_changes(network(bundle, part), lora.changes.get(part, {}))
        for part in parts_of(bundle)
    }
    for part, pairs in fitted.items():
        from peft import LoraConfig, inject_adapter_in_model

        model = network(bundle, part)
        settings = peft_settings(pairs)
        # Exactly these modules: in a list, peft would take the names for ends of names.
        settings["target_modules"] = "|".join(map(re.escape, sorted(pairs)))
        settings |= {"lora_dropout": dropout, "use_dora": dora}
        config = LoraConfig(**settings)  # pyright: ignore[reportArgumentType]
        # Without memory, so that peft's own first values draw from no random state.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
            inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
        for module, layer in _lora_layers(model, name):
            base = layer.get_base_layer().weight
            for half, value in (("lora_A", pairs[module].down), ("lora_B", pairs[module].up)):
                value = value.to(base.device, dtype or base.dtype, copy=True)
                getattr(layer, half)[name].weight = nn.Parameter(value, requires_grad=False)
            if dora:
                begin_dora(layer, name)
        model.train(model.training)  # the new layers as the network is
    for part, changes in added.items():
        if changes or part in fitted:
            sums.add(network(bundle, part), name, changes)


def _check_lora_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"'{name!s:.80}' cannot name a LoRA: letters, digits, _ and - can.")


def _fitted_changes(model: nn.Module, changes: Mapping[str, Change]) -> dict[str, Tensor | Change]:
    """The changes by the names of the weights.

    Raises:
        UserError: there is no such layer.
    """
    known = layers(model)
    fitted: dict[str, Tensor | Change] = {}
    for module, change in changes.items():
        if module not in known:
            raise UserError(f"{module}: no such layer; the LoRA was made for another model.")
        fitted[f"{module}.weight"] = change
    return fitted


def _fitted_sums(model: nn.Module, changes: Mapping[str, Tensor]) -> dict[str, Tensor | Change]:
    known = {**layers(model), **norms(model)}
    fitted: dict[str, Tensor | Change] = {}
    for name, change in changes.items():
        module, _, end = name.rpartition(".")
        if module not in known:
            raise UserError(f"{name}: no such layer; the LoRA was made for another model.")
        fitted[name] = fitting_sum(name, change, known[module], end)
    return fitted


def _fitted(model: nn.Module, pairs: Mapping[str, Factors]) -> dict[str, Factors]:
    known = layers(model)
    for module in pairs:
        if module not in known:
            raise UserError(f"{module}: no such layer; the LoRA was made for another model.")
    return {module: fitting(module, pair, known[module]) for module, pair in pairs.items()}


def _lora_layers(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """peft's layers in a network, all or those that hold a LoRA of this name."""
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and (name is None or name in _scaling(layer)):
            yield module, layer


def _scaling(layer: Any) -> Mapping[str, float]:
    """The strengths of what a layer of peft holds, by name."""
    return layer.scaling


def lora_names(bundle: Bundle) -> list[str]:
    """The LoRAs that are in a model."""
    return list(lora_scales(bundle))


def lora_scales(bundle: Bundle) -> dict[str, float]:
    """The LoRAs that are in a model, with their strengths."""
    return {
        name: scale
        for part in parts_of(bundle)
        for name, scale in sums.sums_of(network(bundle, part)).scales.items()
    }


def scale_loras(bundle: Bundle, scales: Mapping[str, float]) -> None:
    """Set the strength of LoRAs in a model; those that are not named keep theirs.

    Raises:
        UserError: there is no such LoRA, or a scale is not finite, or a sum; nothing is changed.
    """
    for name, scale in scales.items():
        _check_known(bundle, name)
        _check_scale(name, scale)
    before = lora_scales(bundle)
    try:
        _scale(bundle, scales)
    except UserError:
        _scale(bundle, before)
        raise


def _scale(bundle: Bundle, scales: Mapping[str, float]) -> None:
    for part in parts_of(bundle):
        for _, layer in _lora_layers(network(bundle, part)):
            for name in scales.keys() & layer.scaling.keys():
                layer.set_scale(name, scales[name])
            used = [name for name, scale in layer.scaling.items() if scale]
            layer.set_adapter(used, inference_mode=True)
        sums.scale(network(bundle, part), scales)


def _check_known(bundle: Bundle, name: str) -> None:
    if name not in (names := lora_names(bundle)):
        there = f"; there are: {', '.join(names)}" if names else ""
        raise UserError(f"there is no LoRA named '{name!s:.80}' in this model{there}.")


def _check_scale(name: str, scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UserError(f"the scale of '{name!s:.80}' must be a finite number, not {scale!s:.40}.")


def detach_lora(bundle: Bundle, name: str) -> None:
    """Take a LoRA out of a model; after the last one the networks are as they were made.

    Raises:
        UserError: there is no such LoRA.
    """
    scale_loras(bundle, {name: 0.0})
    for part in parts_of(bundle):
        model = network(bundle, part)
        sums.remove(model, name)
        known = getattr(model, "peft_config", {})
        if name not in known:
            continue
        for _, layer in _lora_layers(model, name):
            layer.delete_adapter(name)
        del known[name]
        if not known:
            _unwrap(model)


def _unwrap(model: nn.Module) -> None:
    """Take away the layers that peft put around others."""
    for module, layer in list(_lora_layers(model)):
        parent, _, last = module.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    delattr(model, "peft_config")


def lora_of(bundle: Bundle, name: str = "lora") -> Lora:
    """A LoRA as it is in a model, copied to the CPU, to be saved.

    Raises:
        UserError: there is no such LoRA.
    """
    _check_known(bundle, name)
    found: dict[Part, dict[str, Factors]] = {part: {} for part in PARTS}
    changes: dict[Part, dict[str, Change]] = {part: {} for part in PARTS}
    for part in parts_of(bundle):
        for module, layer in _lora_layers(network(bundle, part), name):
            learned = learned_by(layer, name)
            if isinstance(learned, Factors):
                found[part][module] = learned
            else:
                changes[part][module] = learned
    added: dict[Part, dict[str, Tensor]] = {}
    for part in parts_of(bundle):
        there = sums.sums_of(network(bundle, part)).added.get(name, {})
        added[part] = {n: value for n, value in there.items() if isinstance(value, Tensor)}
        for n, value in there.items():
            module = n.removesuffix(".weight")
            if isinstance(value, LowRank):
                found[part][module] = value.factors
            elif not isinstance(value, Tensor):
                changes[part][module] = value
    return Lora(**found, sums=added, ldm=kohya_names(bundle), changes=changes)


def fused(bundle: Bundle) -> Bundle:
    """A new model, with the LoRAs that are in this one added to its weights at their scales.

    Raises:
        UserError: no LoRA is attached, or the sum is not finite.
    """
    if not lora_names(bundle):
        raise UserError("there is no LoRA in this model to fuse.")
    encoders = {name: _merged(model) for name, model in bundle.conditioner.modules.items()}
    return replace(
        bundle,
        network=bundle.network.with_module(_merged(bundle.network.module)),
        conditioner=bundle.conditioner.with_modules(encoders),
    )


def _merged(model: Network) -> Network:
    if not sums.sums_of(model).added:
        return model
    own = sums.sums_of(model)
    model = copy.deepcopy(model, {id(own): own})  # what it holds is not copied, and
    delattr(model, sums.ATTRIBUTE)  # stays in its parameters
    for module, layer in _lora_layers(model):
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(f"{module}: with its LoRA it is not finite.") from error
    if getattr(model, "peft_config", {}):
        _unwrap(model)
    return model.requires_grad_(False)

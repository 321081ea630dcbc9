"""Single files of Stable Diffusion XL and its refiner, with the names that Stability gave them.

As with `single_file`, a file that was written here holds configs and tokenizers in its header; of
others, configs are inferred from the shapes, and the tokenizers are CLIP's.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.files import scratch_folder
from latentdiff.formats import single_file_configs as infer
from latentdiff.formats import single_file_names as ldm
from latentdiff.formats.diffusers_save import config_of, is_kl, text_config_of, without_offset
from latentdiff.formats.single_file import (
    HEADER,
    PartFiles,
    check_vae,
    part_tensors,
    recognise,
    table_of,
    tokenizer_files,
    tokenizer_of,
    told_configs,
    vae_files,
    warn_of_others,
)
from latentdiff.formats.weights import WeightFiles, blaming, may_replace, save_tensors
from latentdiff.models.text_encoders import PenultimateTower

if TYPE_CHECKING:
    from latentdiff.formats.diffusers_folder import VAE, UNet

Config = dict[str, Any]

_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_SWITCHES = ("zero_empty", "aesthetic")
# Tensors by which a file says that it is preconditioned as in EDM.
_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_LOGIT_SCALE = math.log(100)  # of every CLIP; no picture needs it


@dataclass(frozen=True, eq=False)
class Single:
    """A single file of Stable Diffusion XL, opened; modules have no memory yet.

    Attributes:
        unet, vae, texts: with their weights; None for an autoencoder that is not needed.
        schedule: the scheduler's config.
        zero_empty, aesthetic: see `JoinedConditioner`.
    """

    unet: "tuple[UNet, PartFiles]"
    vae: "tuple[VAE, PartFiles] | None"
    texts: dict[str, tuple[PenultimateTower, PartFiles]]
    schedule: Config
    zero_empty: bool
    aesthetic: bool


def claims(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True for the tensors of such a file, or of its U-Net alone."""
    starts = {name.partition(".")[0] for name in shapes}
    told = f"{ldm.UNET}label_emb.0.0.weight" in shapes
    return (
        "model" in starts and ("conditioner" in starts or told) and "cond_stage_model" not in starts
    )


def open_xl(file: Path, own_vae: bool = True) -> Single:
    """The parts of a single file.

    Args:
        file: the checkpoint.
        own_vae: False where another autoencoder is used.

    Raises:
        UserError: damaged, of another kind of model, or without a tokenizer to be had.
    """
    from latentdiff.formats import diffusers_folder as parts

    with blaming(file):
        stored = WeightFiles([file])
        encoders = _encoders(stored.shapes)
        written = HEADER in stored.metadata
        names = ["unet", "vae", "scheduler", *encoders]
        if written:
            configs, words = told_configs(stored, names, [_ENCODERS[name] for name in encoders])
            switches = told_configs(stored, ("conditioner",), ())[0]["conditioner"]
        else:
            configs, switches = _inferred(file, stored, own_vae)
            words = {}
        if not all(isinstance(switches.get(name), bool) for name in _SWITCHES):
            raise UserError("its header is damaged: conditioner.")
        warn_of_others(file, ("conditioner.", "denoiser."))
        unet = PartFiles(file, [ldm.UNET], table_of("unet", configs["unet"]))
        vae = vae_files(file, configs["vae"]) if own_vae else None
        texts: dict[str, tuple[PenultimateTower, PartFiles]] = {}
        for name, prefix in encoders.items():
            second, config = name == "text_encoder_2", configs[name]
            table = table_of("open_clip" if second else "clip", config)
            files = PartFiles(file, [prefix], table, projection=second)
            with scratch_folder() as scratch:
                place = _ENCODERS[name]
                place = tokenizer_of(
                    file, words.get(place, {}), config.get("vocab_size"), scratch, place
                )
                tower = parts.penultimate_of(config, name, files, place, projection=second)
            if second and not written:
                tower.tokenizer.pad_token = "!"  # as OpenCLIP pads, with token 0
            texts[name] = tower, files
        return Single(
            (parts.unet_of(configs["unet"], "unet", unet), unet),
            vae and (parts.vae_of(configs["vae"], "vae", vae), vae),
            texts,
            configs["scheduler"],
            **{name: switches[name] for name in _SWITCHES},
        )


def _encoders(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The text encoders of a file, and the prefix of each.

    Raises:
        UserError: they are not those of Stable Diffusion XL.
    """
    both = {"text_encoder": ldm.XL_CLIP, "text_encoder_2": ldm.XL_OPEN_CLIP}
    for found in (both, {"text_encoder_2": ldm.REFINER_OPEN_CLIP}):
        if all(any(name.startswith(prefix) for name in shapes) for prefix in found.values()):
            return found
    raise UserError(
        "it does not hold the text encoders of Stable Diffusion XL (conditioner.embedders.*), so "
        "no prompt can be read."
    )


def _inferred(file: Path, stored: WeightFiles, own_vae: bool) -> tuple[dict[str, Config], Config]:
    """The configs of all parts, and what the conditioner is told."""
    shapes = stored.shapes
    if own_vae:
        check_vae(shapes)
    if odd := [name for name in _EDM if name in shapes]:
        raise UserError(
            f"it holds {odd[0]}, so it is preconditioned as in EDM: it does not load here."
        )
    if file.with_suffix(".yaml").is_file():
        raise UserError(
            f"{file.with_suffix('.yaml').name} beside it is not read for Stable Diffusion XL: move "
            "it away, and say with prediction=... (--prediction) what the network predicts."
        )
    declared = infer.declared_prediction(stored.metadata)
    prediction = "v_prediction" if ldm.V_PREDICTION in shapes else declared or "epsilon"
    size = infer.declared_size(stored.metadata) or 128
    unet = infer.unet_config(shapes, size)
    configs: dict[str, Config] = {
        "unet": unet,
        "vae": infer.vae_config(shapes, scale=infer.XL_SCALE) if own_vae else {},
        "scheduler": infer.xl_scheduler_config(prediction, zero_snr=ldm.ZERO_SNR in shapes),
    }
    for name, prefix in _encoders(shapes).items():
        second = name == "text_encoder_2"
        configs[name] = infer.clip_config(shapes, prefix, open_clip=second)
    refiner = "text_encoder" not in configs
    return configs, {"zero_empty": not refiner, "aesthetic": refiner}


def save_xl(
    path: Path,
    vae: "VAE",
    unet: "UNet",
    towers: Mapping[str, PenultimateTower],
    schedule: Config,
    dtype: torch.dtype | None,
    *,
    zero_empty: bool,
    aesthetic: bool,
) -> Path:
    """Write a model as one file; see `Bundle.save`.

    A file that opens here as a model is replaced.

    Raises:
        UserError: it cannot be written, has parts that such files have no names for, or something
            that is no model is there.
    """
    if not is_kl(vae):
        raise UserError("a single file can only hold a KL autoencoder.")
    replace = may_replace(path, "a model file that opens here", recognise)
    vae = without_offset(vae)
    configs: dict[str, Any] = {
        "unet": config_of(unet),
        "vae": config_of(vae),
        "scheduler": dict(schedule),
        "conditioner": {"zero_empty": zero_empty, "aesthetic": aesthetic},
    }
    states: dict[str, Mapping[str, Tensor]] = {"unet": unet.state_dict(), "vae": vae.state_dict()}
    for name, tower in towers.items():
        told = text_config_of(tower.model).to_json_string(use_diff=False)
        configs[name], configs[_ENCODERS[name]] = json.loads(told), tokenizer_files(tower.tokenizer)
        states[name] = tower.model.state_dict()
    values = tensors_of(states, configs, dtype)
    header = {HEADER: json.dumps(configs)}
    declared = infer.MODEL_SPEC_PREDICTIONS.get(str(schedule.get("prediction_type")))
    if declared is not None:  # the other predictions have no name in the standard
        header |= {infer.MODEL_SPEC_PREDICTION: declared}
    if schedule.get("prediction_type") == "v_prediction":
        values[ldm.V_PREDICTION] = torch.zeros(1)
    if schedule.get("rescale_betas_zero_snr"):
        values[ldm.ZERO_SNR] = torch.zeros(1)
    save_tensors(values, path, header, replace=replace)
    return path


def tensors_of(
    states: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, Config],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The tensors of a model by their names in a single file, with all that such files hold.

    Args:
        states: of each part, by the names of diffusers.
        configs: of each part.
        dtype: see `Bundle.save`.

    Raises:
        UserError: such files have no name for one.
    """
    values = part_tensors("unet", states["unet"], configs["unet"], ldm.UNET, dtype)
    values |= part_tensors("vae", states["vae"], configs["vae"], ldm.VAE, dtype)
    second = ldm.REFINER_OPEN_CLIP
    if "text_encoder" in states:
        first, second = configs["text_encoder"], ldm.XL_OPEN_CLIP
        values |= part_tensors("clip", states["text_encoder"], first, ldm.XL_CLIP, dtype)
        places = torch.arange(int(first["max_position_embeddings"]))[None]
        values[f"{ldm.XL_CLIP}embeddings.position_ids"] = places
    last = configs["text_encoder_2"]
    values |= part_tensors("open_clip", states["text_encoder_2"], last, second, dtype)
    like = values[f"{second}token_embedding.weight"]
    values[f"{second}logit_scale"] = torch.tensor(_LOGIT_SCALE, dtype=like.dtype)
    return values

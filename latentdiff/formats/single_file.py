"""Single-file checkpoints, as ComfyUI and A1111 read and write them: Stable Diffusion 1.x and 2.x.

A file that was written here also holds configs and tokenizer, as JSON in its header, and so all of
the model. In others, configs are inferred from the shapes and the tokenizer is CLIP's own.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.files import scratch_folder
from latentdiff.formats import single_file_configs as infer
from latentdiff.formats import single_file_names as ldm
from latentdiff.formats.diffusers_save import (
    config_of,
    is_kl,
    save_tokenizer,
    text_config_of,
    without_offset,
)
from latentdiff.formats.location import clip_tokenizer
from latentdiff.formats.single_file_yaml import Told, read_beside
from latentdiff.formats.weights import (
    WeightFiles,
    blaming,
    check_numbers,
    first_line,
    may_replace,
    save_tensors,
    warn_left_out,
)
from latentdiff.models.text_encoders import ClipTower, TextTower
from latentdiff.reading import parse_json

if TYPE_CHECKING:
    from latentdiff.formats.diffusers_folder import VAE, UNet

Config = dict[str, Any]

HEADER = "latentdiff"
_CONFIGS = ("unet", "vae", "text_encoder", "scheduler")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_CLIP_VOCABULARY = 49408
_PROJECTION = "text_projection.weight"
_UNUSED = ("text_projection", "logit_scale", "attn_mask")
# What training leaves in nearly every whole file: its schedule, and averaged weights beside others.
_SCHEDULE = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus_", "posterior_", "lvlb_weights")
_CUSTOMARY = (*_SCHEDULE, "logvar", "model_ema.", "cond_stage_model.logit_scale")
_TEXT = (ldm.CLIP, infer.CLIP_OLD, ldm.OPEN_CLIP)


class PartFiles(WeightFiles):
    """The tensors of one part of a single file, by the names of diffusers.

    Args:
        file: the checkpoint.
        prefixes: prefixes of the part's names; other names are left alone.
        table: from the names of diffusers to those behind the prefix.
        unused: beginnings of names that no picture needs, which are left out with a warning.
        projection: whether a text encoder's projection is needed.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(
        self,
        file: Path,
        prefixes: Sequence[str],
        table: ldm.Table,
        unused: tuple[str, ...] = (),
        *,
        projection: bool = False,
    ) -> None:
        back = ldm.inverse(table)
        left_out: list[str] = []

        def rename(stored: str) -> str | None:
            for prefix in prefixes:
                if stored.startswith(prefix):
                    name = stored.removeprefix(prefix)
                    if name.startswith(unused):
                        left_out.append(stored)
                        return None
                    # What the table does not know keeps its name, and is refused by it.
                    known = ldm.renamed(name, back) or name
                    return known if projection and known == _PROJECTION else _kept(known)
            return None

        super().__init__([file], rename)
        warn_left_out(file, left_out)
        self._third: dict[str, int] = {}
        for name, shape in list(self.shapes.items()):
            if ".mid_block.attentions.0.to_" in name and shape[2:] == (1, 1):
                self.shapes[name] = shape[:2]  # in the file, a convolution of 1 x 1
            elif ".in_proj_" in name and shape and shape[0] % 3 == 0:
                self._split(name, (shape[0] // 3, *shape[1:]))
            elif name == _PROJECTION:
                self.shapes[name] = shape[::-1]

    def _split(self, name: str, shape: tuple[int, ...]) -> None:
        """Query, key and value, which OpenCLIP keeps in one tensor."""
        del self.shapes[name]
        source = self._source.pop(name)
        for number, letter in enumerate("qkv"):
            single = name.replace(".in_proj_", f".{letter}_proj.")
            self.shapes[single], self._source[single] = shape, source
            self._third[single] = number

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = super().read(name, dtype, device)
        if name in self._third:
            tensor = tensor.chunk(3)[self._third[name]].clone()
        elif name == _PROJECTION:
            tensor = tensor.T.contiguous()  # OpenCLIP multiplies from the other side
        return tensor.reshape(self.shapes[name])


def vae_files(file: Path, config: Config, prefix: str = ldm.VAE) -> PartFiles:
    """The autoencoder's weights, without its training's losses and averages.

    Raises:
        UserError: the file is damaged, or the config is not that of a single file.
    """
    return PartFiles(file, [prefix], table_of("vae", config), ldm.VAE_LEFTOVERS)


def _kept(name: str) -> str | None:
    return None if name.startswith(_UNUSED) or name == "embeddings.position_ids" else name


def _read_configs(file: Path, own_vae: bool = True) -> tuple[dict[str, Config], dict[str, str]]:
    """Configs of unet, vae, text_encoder and scheduler, and the tokenizer's files if it has them.

    Args:
        file: the checkpoint.
        own_vae: whether its autoencoder is needed.

    Raises:
        UserError: the file is damaged or of another kind of model.
    """
    stored = WeightFiles([file])
    if HEADER not in stored.metadata:
        return _inferred(stored, own_vae, read_beside(file)), {}
    configs, words = told_configs(stored, _CONFIGS, ("tokenizer",))
    return configs, words["tokenizer"]


def vae_config(file: Path, stored: WeightFiles, prefix: str, scale: float = 0.18215) -> Config:
    """The config of a file's autoencoder: of its header where it was written here, else by the
    shapes of its tensors and the `.yaml` beside it.

    Args:
        file: a whole model, or an autoencoder alone.
        stored: the file, opened.
        prefix: of the autoencoder's tensors.
        scale: of its latents, where nothing tells it: that of Stable Diffusion 1 and 2.

    Raises:
        UserError: it is damaged.
    """
    if HEADER in stored.metadata:
        return told_configs(stored, ("vae",), ())[0]["vae"]
    if any(name.startswith("conditioner.embedders.") for name in stored.shapes):
        return infer.vae_config(stored.shapes, prefix, infer.XL_SCALE)
    return {**infer.vae_config(stored.shapes, prefix, scale), **read_beside(file).vae}


def told_configs(
    stored: WeightFiles, parts: Sequence[str], tokenizers: Sequence[str]
) -> tuple[dict[str, Config], dict[str, dict[str, str]]]:
    """The configs of parts, and the files of tokenizers, in the header of a file that was written
    here.

    Raises:
        UserError: it is damaged, or does not have one.
    """
    try:
        told: Any = parse_json(stored.metadata[HEADER])
        configs = {part: told[part] for part in parts}
        words = {one: {name: str(told[one][name]) for name in told[one]} for one in tokenizers}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"its header is damaged ({first_line(error)}).") from error
    for part, config in configs.items():
        if not isinstance(config, dict):
            raise UserError(f"its header is damaged: {part} is no JSON object.")
        check_numbers(config, part)
    return configs, words


def check_vae(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a file holds an autoencoder.

    Raises:
        UserError: it does not.
    """
    if not any(name.startswith(ldm.VAE) for name in shapes):
        raise UserError(
            f"it holds no autoencoder ({ldm.VAE}*): give one with vae=... (--vae on the command "
            "line), a folder or a .safetensors file."
        )


def _inferred(stored: WeightFiles, own_vae: bool, told: Told) -> dict[str, Config]:
    shapes = stored.shapes
    if not any(name.startswith(ldm.UNET) for name in shapes):
        raise UserError(
            f"it holds no {ldm.UNET}*, so it is no Stable Diffusion model; a LoRA goes to --lora."
        )
    infer.refuse_others(shapes)
    if own_vae:
        check_vae(shapes)
    if not any(name.startswith(_TEXT) for name in shapes):
        raise UserError("it holds no text encoder (cond_stage_model.*), so no prompt can be read.")
    text = infer.text_config(shapes)
    second = text["hidden_act"] == "gelu"
    if told.layer not in (None, "penultimate" if second else "last"):
        raise UserError(f"its .yaml asks for the {told.layer} layer of the text encoder.")
    prediction = _prediction(stored, second, told)
    size = 96 if second and prediction == "v_prediction" else 64
    schedule = infer.scheduler_config(prediction, zero_snr=ldm.ZERO_SNR in shapes)
    return {
        "unet": infer.unet_config(shapes, infer.declared_size(stored.metadata) or size, told.heads),
        "vae": {**infer.vae_config(shapes), **told.vae} if own_vae else {},
        "text_encoder": text,
        "scheduler": {**schedule, **told.scheduler, "prediction_type": prediction},
    }


def _prediction(stored: WeightFiles, second: bool, told: Told) -> str:
    """Prediction of the network: by a marker among the tensors, the file beside, the header, or the
    test that ComfyUI applies to version 2."""
    if ldm.V_PREDICTION in stored.shapes:
        return "v_prediction"
    declared = told.scheduler.get("prediction_type") or infer.declared_prediction(stored.metadata)
    if declared is not None:
        return str(declared)
    telltale = infer.V_PREDICTION_TELLTALE
    whole = stored.shapes.get(f"{ldm.UNET}input_blocks.0.0.weight", (0, 0))[1] == 4
    if second and whole and telltale in stored.shapes:
        bias = stored.read(telltale, torch.float32, torch.device("cpu"))
        if float(bias.std(correction=0)) > infer.V_PREDICTION_STD:
            return "v_prediction"
    return "epsilon"


def open_single(
    file: Path, own_vae: bool = True
) -> tuple[
    tuple["UNet", PartFiles],
    "tuple[VAE, PartFiles] | None",
    tuple[ClipTower, PartFiles],
    Config,
]:
    """U-Net, autoencoder and text tower, without memory yet, with their weights; the schedule.

    Args:
        file: the checkpoint.
        own_vae: False where another autoencoder is used; then None stands for its own.

    Raises:
        UserError: damaged, of another kind of model, or without a tokenizer to be had.
    """
    from latentdiff.formats import diffusers_folder as parts

    with blaming(file):
        configs, words = _read_configs(file, own_vae)
        unet, text = _part_files(file, configs)
        vae = vae_files(file, configs["vae"]) if own_vae else None
        config = configs["text_encoder"]
        with scratch_folder() as scratch:
            place = tokenizer_of(file, words, config.get("vocab_size"), scratch)
            tower = parts.clip_of(config, "text_encoder", text, place)
        if not words and config["hidden_act"] == "gelu":
            tower.tokenizer.pad_token = "!"  # version 2 pads with it
        return (
            (parts.unet_of(configs["unet"], "unet", unet), unet),
            vae and (parts.vae_of(configs["vae"], "vae", vae), vae),
            (tower, text),
            configs["scheduler"],
        )


def _part_files(file: Path, configs: Mapping[str, Config]) -> tuple[PartFiles, PartFiles]:
    """Weights of the U-Net and the text encoder; of what is of no part, a warning."""
    unet, text = (table_of(part, configs[part]) for part in ("unet", "text_encoder"))
    files = PartFiles(file, _TEXT, text)
    layers = configs["text_encoder"].get("num_hidden_layers")
    for name in list(files.shapes):  # what version 2 does not look at
        if name.startswith(f"transformer.resblocks.{layers}."):
            del files.shapes[name]
    warn_of_others(file, _TEXT)
    return PartFiles(file, [ldm.UNET], unet), files


def warn_of_others(file: Path, texts: tuple[str, ...]) -> None:
    """Say which tensors are of no part; `texts` are prefixes of text encoders."""
    known = (ldm.UNET, ldm.VAE, *texts, *_CUSTOMARY, ldm.V_PREDICTION, ldm.ZERO_SNR)
    warn_left_out(file, [name for name in WeightFiles([file]).shapes if not name.startswith(known)])


def table_of(part: str, config: Config) -> ldm.Table:
    """The names of a part: "unet", "vae", or a text encoder in the spelling "clip" or "open_clip";
    "text_encoder" is the one of Stable Diffusion 1 and 2 that its config says.

    Raises:
        UserError: its layers have no names in a single file.
    """
    if part == "text_encoder":
        part = "open_clip" if config.get("hidden_act") == "gelu" else "clip"
    if part == "clip":
        return {name: name for name in ("embeddings", "encoder", "final_layer_norm")}
    if part == "open_clip":
        layers = config.get("num_hidden_layers")
        return ldm.open_clip_table(layers if isinstance(layers, int) else 0)
    layers, blocks = config.get("layers_per_block"), config.get("down_block_types")
    if not isinstance(layers, int) or not isinstance(blocks, list | tuple):
        raise UserError(f"{part}: a single file has no names for layers that differ in number.")
    if part == "vae":
        return ldm.vae_table(layers, len(blocks))
    return ldm.unet_table(layers, ["CrossAttn" in str(block) for block in blocks])


def tokenizer_of(
    file: Path,
    tokenizer: Mapping[str, str],
    vocabulary: object,
    scratch: Path,
    name: str = "tokenizer",
) -> Path:
    """A folder with the tokenizer: what the file holds, the one beside it, or CLIP's, which is
    bundled.

    Args:
        file: the checkpoint.
        tokenizer: the tokenizer's files that its header holds.
        vocabulary: the number of tokens that the text encoder knows.
        scratch: an empty folder.
        name: of the folder beside it.

    Raises:
        UserError: no tokenizer was found.
    """
    if tokenizer:
        for part in _TOKENIZER_FILES:
            if part in tokenizer:
                (scratch / part).write_text(tokenizer[part], "utf-8")
        return scratch
    if (beside := file.parent / name).is_dir():
        return beside
    if vocabulary != _CLIP_VOCABULARY:
        raise UserError(
            f"it holds no tokenizer, and its {vocabulary} tokens are not CLIP's; put the folder "
            "tokenizer/ of the model beside it."
        )
    return clip_tokenizer()


def save_single(
    path: Path,
    vae: "VAE",
    unet: "UNet",
    text: TextTower,
    schedule: dict[str, object],
    dtype: torch.dtype | None,
) -> Path:
    """Write a model as one file; see `Bundle.save`.

    A file that `open_single` takes for a model by its header is replaced.

    Raises:
        UserError: it cannot be written, has parts that such files have no names for, or something
            that is no model is there.
    """
    if not isinstance(text, ClipTower) or not is_kl(vae):
        raise UserError("a single file can only hold a KL autoencoder and a CLIP text encoder.")
    replace = may_replace(path, "a model file that opens here", recognise)
    vae = without_offset(vae)
    configs: dict[str, Config] = {
        "unet": config_of(unet),
        "vae": config_of(vae),
        "text_encoder": json.loads(text_config_of(text.model).to_json_string(use_diff=False)),
        "scheduler": dict(schedule),
    }
    second = text.model.config.hidden_act == "gelu"
    values: dict[str, Tensor] = {}
    for part, network, prefix in (
        ("unet", unet, ldm.UNET),
        ("vae", vae, ldm.VAE),
        ("text_encoder", text.model, ldm.OPEN_CLIP if second else ldm.CLIP),
    ):
        values |= part_tensors(part, network.state_dict(), configs[part], prefix, dtype)
    header = {HEADER: json.dumps({**configs, "tokenizer": tokenizer_files(text.tokenizer)})}
    declared = infer.MODEL_SPEC_PREDICTIONS.get(str(schedule.get("prediction_type")))
    if declared is not None:  # the other predictions have no name in the standard
        header |= {infer.MODEL_SPEC_PREDICTION: declared}
    save_tensors(values, path, header, replace=replace)
    return path


def recognise(path: Path) -> None:
    """Check that a file is a model that opens here, by its header or the names of its tensors.

    Raises:
        UserError: it is none.
    """
    stored = WeightFiles([path])
    if HEADER in stored.metadata:
        told_configs(stored, ("unet", "vae", "scheduler"), ())
    elif not any(name.startswith("conditioner.embedders.") for name in stored.shapes):
        _read_configs(path)
    else:
        infer.unet_config(stored.shapes, 128)


def part_tensors(
    part: str,
    state: Mapping[str, Tensor],
    config: Config,
    prefix: str,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The tensors of a part, by their names in a single file.

    Args:
        part: as in `table_of`.
        state: the tensors by the names of diffusers.
        config: of the part.
        prefix: of the names.
        dtype: see `Bundle.save`.

    Raises:
        UserError: such files have no name for one.
    """
    table = table_of(part, config)
    open_clip = "token_embedding" in table.values()
    values: dict[str, Tensor] = {}
    for name, value in _joined(state) if open_clip else state.items():
        if (stored := ldm.renamed(name, table)) is None:
            raise UserError(f"{part}: a single file has no name for the layer {name}.")
        if ".mid_block.attentions.0.to_" in name and value.ndim == 2 and part == "vae":
            value = value[..., None, None]
        elif name == _PROJECTION:
            value = value.T
        values[prefix + stored] = value.detach().to("cpu", dtype or value.dtype)
    return values


def tokenizer_files(tokenizer: Any) -> dict[str, str]:
    """The files of a tokenizer, to be kept in a header."""
    with scratch_folder() as scratch:
        save_tokenizer(tokenizer, scratch)
        found = [scratch / name for name in _TOKENIZER_FILES]
        return {file.name: file.read_text("utf-8") for file in found if file.is_file()}


def _joined(state: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Query, key and value in one tensor, as OpenCLIP has them."""
    joined: list[tuple[str, Tensor]] = []
    for name, value in state.items():
        if ".q_proj." in name:
            three = [state[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            joined.append((name.replace(".q_proj.", ".in_proj_"), torch.cat(three)))
        elif ".k_proj." not in name and ".v_proj." not in name:
            joined.append((name, value))
    return joined

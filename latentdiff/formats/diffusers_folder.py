"""The networks and the tokenizer of a model folder, each built from its config and its files.

Networks are ours where the config says what these understand, to the last key; of others the class
is that of diffusers or transformers, which are not imported before.
"""

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch

from latentdiff.errors import UserError
from latentdiff.formats.config_values import (
    DIFFUSERS_TYPES,
    check_above_zero,
    check_types,
    older_than,
    refuse_quantised,
)
from latentdiff.formats.single_file_names import VAE_LEFTOVERS
from latentdiff.formats.tokenizer_files import load_tokenizer
from latentdiff.formats.weights import (
    WeightFiles,
    blaming,
    build,
    check_numbers,
    first_line,
    read_json,
    warn_left_out,
    weight_files,
)
from latentdiff.models.clip_text import (
    ClipTextConfig,
    ClipTextEncoder,
    ClipTextEncoderWithProjection,
)
from latentdiff.models.controlnet import ControlNet
from latentdiff.models.cross_attention_unet import CrossAttentionUNet, EnergyUNet, GeneratorUNet
from latentdiff.models.haar import HaarTransform
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.t5_text import T5TextConfig, T5TextEncoder
from latentdiff.models.text_encoders import ClipTower, PenultimateTower, T5Tower, TextTower
from latentdiff.models.tiny_autoencoder import TinyAutoencoder

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPVisionModelWithProjection
    from transformers.models.t5.modeling_t5 import T5EncoderModel

Config = dict[str, Any]
UNet = Union[CrossAttentionUNet, "UNet2DConditionModel"]
VAE = Union[KLAutoencoder, TinyAutoencoder, HaarTransform, "AutoencoderKL", "VQModel"]

_STEM = "diffusion_pytorch_model"
_LARGEST_SEEN = 2048  # pixels along a side of what an image encoder sees; published ones see 224


def check_variant(folder: Path, variant: str) -> None:
    """See that some part of a model folder has weights of this variant.

    Raises:
        UserError: none has.
    """
    if not re.fullmatch(r"\w[\w-]{0,63}", variant):
        raise UserError(f"variant: '{variant!s:.80}' is no name of one; bf16 is.")
    for part in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2"):
        if any((folder / part).glob(f"*.{variant}.*")):
            return
    raise UserError(f"{folder}: no part of it has weights of the variant {variant}.")


def unet(folder: Path, variant: str | None = None) -> tuple[UNet, WeightFiles]:
    """The U-Net of unet/, without memory yet, and its weights; see `weight_files`.

    Raises:
        UserError: missing, damaged, or not what its config says.
    """
    path = folder / "config.json"
    config, files = read_config(path), WeightFiles(weight_files(folder, _STEM, variant))
    size = config.get("sample_size")
    if older_than(config, 0, 9) and isinstance(size, int) and size < 64:
        config["sample_size"] = 64  # as diffusers corrects the first configs of Stable Diffusion
    return unet_of(config, str(path), files), files


def unet_of(config: Config, name: str, files: WeightFiles) -> UNet:
    """The U-Net of a config, without memory yet.

    Raises:
        UserError: the config, called `name`, describes none, or not that of the files.
    """
    modules = {"UNet2DConditionModel": "diffusers.models.unets.unet_2d_condition"}
    for kind in (GeneratorUNet, EnergyUNet):
        if config.get("_class_name") == kind.diffusers_name:
            return _own(config, name, files, kind)
    return _network(config, name, files, CrossAttentionUNet, modules)


def _own(
    config: Config, name: str, files: WeightFiles, kind: type[CrossAttentionUNet]
) -> CrossAttentionUNet:
    """A U-Net of a kind that diffusers does not have, without memory yet.

    Raises:
        UserError: its config says what such a network does not know.
    """
    check_types(config, DIFFUSERS_TYPES, name)
    check_above_zero(config, _SIZES, name)
    if not kind.understands(config) or (kind.draws and not config.get("time_cond_proj_dim")):
        raise UserError(f"{name}: it describes no {kind.diffusers_name} that works here.")
    _check_heads(config, name)
    return build(lambda: kind(config), name, files, _count_blocks(config))


def controlnet(folder: Path, variant: str | None = None) -> tuple[ControlNet, WeightFiles]:
    """The ControlNet of a folder of its own, without memory yet, and its weights.

    Raises:
        UserError: missing, damaged, or not what its config says.
    """
    path = folder / "config.json"
    config, files = read_config(path), WeightFiles(weight_files(folder, _STEM, variant))
    return controlnet_of(config, str(path), files), files


def controlnet_of(config: Config, name: str, files: WeightFiles) -> ControlNet:
    """The ControlNet of a config, without memory yet.

    Raises:
        UserError: the config, called `name`, describes none that works here, or not that of the
            files.
    """
    if config.get("_class_name") != ControlNet.diffusers_name:
        raise UserError(
            f"{name}: it describes {config.get('_class_name')!s:.60}, and no ControlNetModel."
        )
    check_types(config, DIFFUSERS_TYPES, name)
    check_above_zero(config, _SIZES, name)
    if not ControlNet.understands(config):
        raise UserError(f"{name}: {ControlNet.odd(config)} is for another kind of ControlNet.")
    _check_heads(config, name)
    return build(lambda: ControlNet(config), name, files, _count_blocks(config))


def image_encoder(folder: Path) -> "tuple[CLIPVisionModelWithProjection, WeightFiles]":
    """The picture tower of a CLIP in a folder, without memory yet, and its weights.

    Raises:
        UserError: missing, damaged, or not what its config says.
    """
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

    path = folder / "config.json"
    config = read_config(path)
    inner = config.get("vision_config")
    if config.get("model_type") == "clip" and isinstance(inner, dict):
        width = {key: config[key] for key in ("projection_dim",) if key in config}
        config = {**inner, **width, "model_type": "clip_vision_model"}
    if config.get("model_type") != "clip_vision_model":
        raise UserError(f"{path}: '{config.get('model_type')!s:.40}' is no CLIP of pictures.")
    arguments = _text_arguments(config, CLIPVisionConfig, {}, str(path))
    side = arguments.get("image_size", 224)
    if not isinstance(side, int) or not 1 <= side <= _LARGEST_SEEN:
        raise UserError(
            f"{path}: its image_size must be one number, of square pictures of at most "
            f"{_LARGEST_SEEN} pixels a side."
        )
    if arguments.get("num_channels", 3) != 3:
        raise UserError(f"{path}: its num_channels must be 3, of RGB pictures.")
    files = WeightFiles(weight_files(folder, "model"), _vision_name)
    layers, kind = _count(config, "num_hidden_layers", 12), CLIPVisionModelWithProjection
    return build(lambda: kind(CLIPVisionConfig(**arguments)), str(path), files, layers), files


def vae(folder: Path, variant: str | None = None) -> tuple[VAE, WeightFiles]:
    """The autoencoder of vae/, without memory yet, and its weights; see `weight_files`.

    Raises:
        UserError: missing, damaged, or not what its config says.
    """
    path = folder / "config.json"
    config = read_config(path)
    weights = weight_files(folder, _STEM, variant)
    files = WeightFiles(weights, _vae_name)
    left_out = [name for name in WeightFiles(weights).shapes if name.startswith(VAE_LEFTOVERS)]
    warn_left_out(folder, left_out)
    return vae_of(config, str(path), files), files


def vae_of(config: Config, name: str, files: WeightFiles) -> VAE:
    """The autoencoder of a config, without memory yet.

    Raises:
        UserError: the config, called `name`, describes none, or not that of the files.
    """
    if config.get("_class_name") == HaarTransform.diffusers_name:
        return build(lambda: HaarTransform(config), name, files, 1)
    modules = {
        "AutoencoderKL": "diffusers.models.autoencoders.autoencoder_kl",
        "VQModel": "diffusers.models.autoencoders.vq_model",
    }
    if config.get("_class_name") == TinyAutoencoder.diffusers_name:
        return _tiny(config, name, files)
    return _network(config, name, files, KLAutoencoder, modules)


def _tiny(config: Config, name: str, files: WeightFiles) -> TinyAutoencoder:
    """A tiny autoencoder of a config, without memory yet.

    Raises:
        UserError: the config, called `name`, is of another network, or not that of the files.
    """
    check_types(config, DIFFUSERS_TYPES, name)
    check_above_zero(config, _SIZES, name)
    if odd := TinyAutoencoder.odd(config):
        raise UserError(f"{name}: {odd} is for another kind of {TinyAutoencoder.diffusers_name}.")
    blocks = [count for key in config if key.startswith("num_") for count in config[key]]
    return build(lambda: TinyAutoencoder(config), name, files, sum(blocks) + len(blocks))


def _network(
    config: Config,
    name: str,
    files: WeightFiles,
    ours: type[CrossAttentionUNet] | type[KLAutoencoder],
    modules: dict[str, str],
) -> Any:
    """Our class or that of diffusers, without memory yet; `modules` has theirs by their names."""
    kind = str(config.get("_class_name"))
    if kind not in modules:
        tiny = [TinyAutoencoder.diffusers_name] if ours is KLAutoencoder else []
        raise UserError(
            f"{name}: it describes {config.get('_class_name')!s:.60}; only "
            f"{' and '.join([*modules, *tiny])} work here."
        )
    check_types(config, DIFFUSERS_TYPES, name)
    check_above_zero(config, _SIZES, name)
    if kind == ours.diffusers_name and ours.understands(config):
        if ours is CrossAttentionUNet:
            _check_heads(config, name)
        return build(lambda: ours(config), name, files, _count_blocks(config))
    theirs = getattr(import_module(modules[kind]), kind)
    known = inspect.signature(theirs.__init__).parameters
    arguments = {key: value for key, value in config.items() if key in known.keys() - {"self"}}
    check_types(arguments, {key: known[key].annotation for key in arguments}, name)
    network = build(lambda: theirs(**arguments), name, files, _count_blocks(config))
    if odd := sorted(k for k in arguments.keys() - _CUSTOMARY if not _is_default(config, known[k])):
        _try_out(network, name, odd)
    return network


def _check_heads(config: Config, name: str) -> None:
    """Check that attention heads divide the width of the levels that attend.

    Raises:
        UserError: they do not.
    """
    widths, blocks = config.get("block_out_channels", []), config.get("down_block_types", [])
    heads = _each(config.get("attention_head_dim", 8), len(widths))
    for level, (width, block, count) in enumerate(zip(widths, blocks, heads, strict=False)):
        attends = "CrossAttn" in block or level == len(widths) - 1  # as the middle does
        if attends and width % count:
            raise UserError(f"{name}: attention_head_dim: {count} heads do not divide {width}.")


def _is_default(config: Config, parameter: inspect.Parameter) -> bool:
    value = config[parameter.name]
    return (tuple(value) if isinstance(value, list) else value) == parameter.default


_SIZES = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "norm_num_groups")
_SIZES += ("layers_per_block", "cross_attention_dim", "attention_head_dim", "num_attention_heads")
_SIZES += ("encoder_block_out_channels", "decoder_block_out_channels", "num_class_embeds")
_SIZES += ("time_cond_proj_dim", "conditioning_channels", "conditioning_embedding_out_channels")
# Keys that sound models set, and whose values the shapes of the weights or the nouns confirm.
_CUSTOMARY = {
    *("sample_size", "in_channels", "out_channels", "latent_channels", "block_out_channels"),
    *("down_block_types", "up_block_types", "layers_per_block", "norm_num_groups"),
    *("cross_attention_dim", "attention_head_dim", "num_attention_heads", "use_linear_projection"),
    *("time_cond_proj_dim", "num_class_embeds"),
    *("upcast_attention", "scaling_factor", "shift_factor", "latents_mean", "latents_std"),
    *("num_vq_embeddings", "vq_embed_dim", "use_quant_conv", "use_post_quant_conv", "force_upcast"),
}


@torch.no_grad()
def _try_out(network: Any, name: str, keys: list[str]) -> None:
    """Call a network without memory once: it costs no arithmetic, and shows what cannot work.

    Raises:
        UserError: the call fails.
    """
    config, added = network.config, {}
    if "block_out_channels" not in config:  # of transformers
        inputs = [torch.zeros(1, 2, dtype=torch.int64, device="meta")]
    else:
        side = 4 * 2 ** len(config["block_out_channels"])
        inputs = [torch.empty(1, config["in_channels"], side, side, device="meta")]
        if "cross_attention_dim" in config:
            width = config["encoder_hid_dim"] or config["cross_attention_dim"]
            width = width[0] if isinstance(width, list | tuple) else width
            inputs += [torch.empty(1, device="meta"), torch.empty(1, 2, width, device="meta")]
            added = _added(config)
            if config["class_embed_type"] is not None or config["num_class_embeds"] is not None:
                added["class_labels"] = torch.zeros(1, dtype=torch.int64, device="meta")
    try:
        network(*inputs, **added)
    except Exception as error:  # anything at all
        raise UserError(
            f"{name}: with its {' and '.join(keys)} it cannot be called ({first_line(error)})."
        ) from error


def _added(config: Mapping[str, Any]) -> Config:
    """Further inputs of a U-Net that is told pooled text and numbers: one number, for a trial."""
    if config.get("addition_embed_type") != "text_time":
        return {}
    pooled = config["projection_class_embeddings_input_dim"] - config["addition_time_embed_dim"]
    shapes = {"text_embeds": max(0, pooled), "time_ids": 1}
    added = {name: torch.empty(1, width, device="meta") for name, width in shapes.items()}
    return {"added_cond_kwargs": added}


def read_config(path: Path) -> Config:
    """A config of sane numbers.

    Raises:
        UserError: see `read_json` and `check_numbers`.
    """
    config = read_json(path)
    check_numbers(config, str(path))
    refuse_quantised(config, str(path))
    return config


def _count_blocks(config: Config) -> int:
    """Estimate from below how many layers, of at least one tensor each, the config asks for."""
    sides = (config.get(key) for key in ("down_block_types", "up_block_types"))
    blocks = max((side for side in sides if isinstance(side, list)), key=len, default=[])
    layers = _each(config.get("layers_per_block"), len(blocks))
    depths = _each(config.get("transformer_layers_per_block"), len(blocks))
    return sum(
        max(1, count) * (max(1, depth) if "CrossAttn" in str(block) else 1)
        for block, count, depth in zip(blocks, layers, depths, strict=False)
    )


def _each(value: object, count: int) -> list[int]:
    """One number for each block, whether the config has one for all or a list."""
    if isinstance(value, list):
        return [max(_each(part, 1), default=1) for part in value]
    return [value if isinstance(value, int) else 1] * count


def text(
    folder: Path, tokenizer: Path, variant: str | None = None
) -> tuple[TextTower, WeightFiles]:
    """The text encoder of text_encoder/, without memory yet, with its tokenizer.

    Raises:
        UserError: missing, damaged, or not what its config says.
    """
    path = folder / "config.json"
    config = _text_config(path)
    kind = str(config.get("model_type"))
    files = WeightFiles(weight_files(folder, "model", variant), _RENAMES.get(kind, str))
    if kind == "clip_text_model":
        return clip_of(config, str(path), files, tokenizer), files
    if kind in _T5_KINDS:
        files.share("shared.weight", "encoder.embed_tokens.weight")
        t5 = _build_t5(kind, config, str(path), files)
        words = load_tokenizer(tokenizer, "T5Tokenizer")
        with blaming(tokenizer):
            return T5Tower(t5, words), files
    raise UserError(f"{path}: '{kind:.40}' is neither a CLIP text model nor a T5 encoder.")


def _text_config(path: Path) -> Config:
    """The config of a text encoder, out of that of a whole CLIP too."""
    config = read_config(path)
    if config.get("model_type") == "clip" and isinstance(inner := config.get("text_config"), dict):
        return {**inner, "model_type": "clip_text_model"}
    return config


def penultimate(
    folder: Path, tokenizer: Path, variant: str | None = None, *, projection: bool
) -> tuple[PenultimateTower, WeightFiles]:
    """A text encoder of Stable Diffusion XL, without memory yet, with its tokenizer.

    Args:
        folder: of the encoder, a CLIP text model.
        tokenizer: its folder.
        variant: see `weight_files`.
        projection: whether it also gives the pooled vector.

    Raises:
        UserError: missing, damaged, or not what its config says.
    """
    path = folder / "config.json"
    config = _text_config(path)
    if config.get("model_type") != "clip_text_model":
        raise UserError(f"{path}: '{config.get('model_type')!s:.40}' is no CLIP text model.")
    rename = _projection_name if projection else _clip_name
    files = WeightFiles(weight_files(folder, "model", variant), rename)
    return penultimate_of(config, str(path), files, tokenizer, projection=projection), files


def penultimate_of(
    config: Config, name: str, files: WeightFiles, tokenizer: Path, *, projection: bool
) -> PenultimateTower:
    """A text encoder of Stable Diffusion XL of a config: see `penultimate`.

    Raises:
        UserError: the config, called `name`, describes none, or not that of the files.
    """
    kind = ClipTextEncoderWithProjection if projection else ClipTextEncoder
    clip = _build_clip(config, name, files, kind)
    words = load_tokenizer(tokenizer, "CLIPTokenizer")
    with blaming(tokenizer):
        return PenultimateTower(clip, words)


def clip_of(config: Config, name: str, files: WeightFiles, tokenizer: Path) -> ClipTower:
    """The CLIP text encoder of a config, without memory yet, with its tokenizer.

    Raises:
        UserError: the config, called `name`, describes none, or not that of the files.
    """
    clip = _build_clip(config, name, files)
    words = load_tokenizer(tokenizer, "CLIPTokenizer")
    with blaming(tokenizer):
        return ClipTower(clip, words)


def _build_clip(
    config: Config,
    name: str,
    files: WeightFiles,
    kind: type[ClipTextEncoder] = ClipTextEncoder,
) -> "ClipTextEncoder | CLIPTextModel":
    further = {"use_attention_mask": bool}  # which diffusers' pipelines read
    arguments = _text_arguments(config, ClipTextConfig, further, name)
    if not isinstance(config.get("eos_token_id", 0), int):
        raise UserError(f"{name}: its eos_token_id must be one whole number.")
    layers = _count(config, "num_hidden_layers", 12)
    if not arguments.pop("use_attention_mask", False):
        told = ClipTextConfig(**arguments)
        if ClipTextEncoder.understands(told):
            return build(lambda: kind(told), name, files, layers)
    if kind is not ClipTextEncoder:
        raise UserError(f"{name}: of encoders with a projection only plain ones of CLIP work here.")
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    arguments["use_attention_mask"] = config.get("use_attention_mask", False)
    network = build(lambda: CLIPTextModel(CLIPTextConfig(**arguments)), name, files, layers)
    _try_out(network, name, ["hidden_act", "layer_norm_eps"])
    return network


def _build_t5(
    kind: str, config: Config, name: str, files: WeightFiles
) -> "T5TextEncoder | T5EncoderModel":
    layers = _count(config, "num_layers", 6)
    # Both follow from feed_forward_proj, but where a file has them they beat it.
    further = {"dense_act_fn": str, "is_gated_act": bool}
    if kind == "t5":
        told = T5TextConfig(**_text_arguments(config, T5TextConfig, further, name))
        if T5TextEncoder.understands(told):
            return build(lambda: T5TextEncoder(told), name, files, layers)
    library = import_module(f"transformers.models.{kind}")
    configuration = getattr(library, f"{_T5_KINDS[kind]}Config")
    encoder = getattr(library, f"{_T5_KINDS[kind]}EncoderModel")
    arguments = _text_arguments(config, configuration, further, name) | {"num_decoder_layers": 1}
    network = build(lambda: encoder(configuration(**arguments)), name, files, layers)
    buckets = ("relative_attention_num_buckets", "relative_attention_max_distance")
    if [arguments.get(key) for key in buckets] != [32, 128]:
        _try_out(network, name, list(buckets))
    return network


def _text_arguments(config: Config, kind: type, further: dict[str, type], name: str) -> Config:
    """The entries of a text encoder's config that its builder takes, checked.

    Args:
        further: keys that the builder takes besides those it declares, and their types.

    Raises:
        UserError: a value is of another type, or a size is not above 0.
    """
    arguments = known(config, kind)
    check_types(arguments, kind.__annotations__, name)
    sizes = ("size", "layers", "heads", "positions", "embeddings", "buckets", "distance")
    check_above_zero(arguments, (key for key in arguments if key.endswith(sizes)), name)
    for key in further.keys() & config.keys():
        if not isinstance(config[key], further[key]):
            told = further[key].__name__
            raise UserError(f"{name}: {key} is {config[key]!r:.60}; it must be {told}.")
        arguments[key] = config[key]
    return arguments


def known(config: Config, kind: type) -> Config:
    """Keep only the config entries that the architecture declares.

    Others in a transformers config can name kernels, code to fetch or a quantisation, and must not
    reach the builder.
    """
    return {key: value for key, value in config.items() if key in kind.__annotations__}


def _count(config: Config, key: str, default: int) -> int:
    value = config.get(key, default)
    return value if isinstance(value, int) else default


# Of the VAE's attention: as diffusers wrote it for Stable Diffusion 1, and as it does today.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _vae_name(stored: str) -> str | None:
    if stored.startswith(VAE_LEFTOVERS):
        return None
    for old, today in _OLD_ATTENTION.items():
        stored = stored.replace(f".{old}.", f".{today}.")
    return stored


def _clip_name(stored: str) -> str | None:
    name = stored.removeprefix("text_model.")
    unused = ("text_projection.", "vision_model.", "visual_projection.", "logit_scale")
    return None if name.startswith(unused) or name == "embeddings.position_ids" else name


def _vision_name(stored: str) -> str | None:
    unused = ("text_model.", "text_projection.", "logit_scale")
    left_out = stored.startswith(unused) or stored.endswith("embeddings.position_ids")
    return None if left_out else stored


def _projection_name(stored: str) -> str | None:
    return stored if stored == "text_projection.weight" else _clip_name(stored)


def _t5_name(stored: str) -> str | None:
    return None if stored.startswith(("decoder.", "lm_head.")) else stored


_T5_KINDS = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
_RENAMES = {"clip_text_model": _clip_name, "clip": _clip_name} | dict.fromkeys(_T5_KINDS, _t5_name)

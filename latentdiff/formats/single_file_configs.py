"""Configs of a single-file checkpoint, inferred from the shapes of its tensors."""

import re
from collections.abc import Mapping, Sequence

from latentdiff.errors import UserError
from latentdiff.formats.single_file_names import CLIP, OPEN_CLIP, UNET, VAE

Config = dict[str, object]

# Where the weights of a model that predicts v differ from eps, by experience: ComfyUI's test.
V_PREDICTION_TELLTALE = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_PREDICTION_STD = 0.09

XL_WAVES = 256
"""Sines and cosines of each number that a U-Net of Stable Diffusion XL is told."""
XL_CONTEXT = 2048
"""Width of the text states that networks of Stable Diffusion XL attend to."""
XL_SCALE = 0.13025
"""The scale of the latents of Stable Diffusion XL."""


class Shapes:
    """Shapes of the tensors of one part, without its prefix.

    Raises:
        UserError: a tensor that every such checkpoint has is not there.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> None:
        self.prefix = prefix
        self.known = {
            name.removeprefix(prefix): shape
            for name, shape in shapes.items()
            if name.startswith(prefix)
        }

    def __contains__(self, name: str) -> bool:
        return name in self.known

    def side(self, name: str, axis: int) -> int:
        shape = self.known.get(name, ())
        if axis >= len(shape):
            raise UserError(
                f"it holds no {self.prefix}{name}, so it is no Stable Diffusion 1.x or 2.x model."
            )
        return shape[axis]

    def count(self, form: str) -> int:
        """Count the consecutive tensor names that `form` gives with 0, 1, 2, ..."""
        count = 0
        while form.format(count) in self.known:
            count += 1
        return count


def refuse_others(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Pass the tensors of Stable Diffusion 1.x and 2.x.

    Raises:
        UserError: some are of a later model.
    """
    later = ("label_emb.", "conditioner.", f"{UNET}label_emb.", f"{UNET}conditioner.")
    if any(name.startswith(later) for name in shapes):
        raise UserError("it is of unCLIP or another model than those that load here.")


def unet_config(
    shapes: Mapping[str, tuple[int, ...]], size: int, told: tuple[str, int] | None = None
) -> Config:
    """Infer the config of `UNet2DConditionModel`, by the rules of Stable Diffusion 1, 2 and XL.

    Args:
        shapes: the shapes of all tensors of the checkpoint.
        size: the side of the pictures that it was trained on, in latents.
        told: the "number" or the "width" of attention heads, where something tells it.
    """
    part = Shapes(shapes, UNET)
    levels = _levels(part)
    widths = [level[0][0] for level in levels]
    depths = [level[0][1] for level in levels]
    middle = part.count("middle_block.1.transformer_blocks.{}.norm1.weight")
    sized = "label_emb.0.0.weight" in part
    if not middle or (not sized and {depth for depth in depths if depth} - {middle}):
        raise UserError("its U-Net is not that of Stable Diffusion 1.x or 2.x.")
    if sized and depths[-1] not in (None, middle):
        raise UserError("the middle of its U-Net is not as deep as its last level.")
    linear = len(part.known.get("middle_block.1.proj_in.weight", ())) == 2
    distilled = "time_embed.cond_proj.weight" in part
    kind, count = told or (("width", 64) if linear else ("number", 8))
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": size,
        "in_channels": part.side("input_blocks.0.0.weight", 1),
        "out_channels": part.side("out.2.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": _down_types(depths),
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in depths[::-1]],
        "transformer_layers_per_block": [*(depth or 1 for depth in depths[:-1]), middle]
        if sized
        else middle,
        "cross_attention_dim": part.side(
            "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1
        ),
        "use_linear_projection": linear,
        **_told_sizes(part),
        "time_cond_proj_dim": part.side("time_embed.cond_proj.weight", 1) if distilled else None,
        # Heads leave no trace in the shapes: 64 wide in version 2 and XL, eight of them in 1.
        # diffusers reads `attention_head_dim` as the number of heads (its issue 2011).
        "attention_head_dim": [max(1, width // count) for width in widths]
        if kind == "width"
        else count,
    }


def control_config(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> Config:
    """Infer the config of `ControlNetModel`, by the rules of Stable Diffusion 1, 2 and XL.

    Of those of XL smaller ones have attention in some levels only, or transformers without blocks.
    """
    part = Shapes(shapes, prefix)
    levels = _levels(part)
    widths = [level[0][0] for level in levels]
    depths = [level[0][1] for level in levels]
    sized = "label_emb.0.0.weight" in part
    middle = _depth(part, "middle_block.1")
    block = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    known = middle is not None and not {*depths} - {None, middle}
    if depths[-1] not in (None, middle) or not (sized or known):
        raise UserError("its layers are not those of Stable Diffusion 1.x, 2.x or XL.")
    linear = sized or len(part.known.get("middle_block.1.proj_in.weight", ())) == 2
    embedding = [part.side("input_hint_block.0.weight", 0)]
    while f"input_hint_block.{4 * len(embedding) + 2}.weight" in part:  # behind them one more
        embedding.append(part.side(f"input_hint_block.{4 * len(embedding)}.weight", 0))
    return {
        "_class_name": "ControlNetModel",
        "in_channels": part.side("input_blocks.0.0.weight", 1),
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": _down_types(depths),
        "mid_block_type": "UNetMidBlock2D" if middle is None else "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": [1 if d is None else d for d in (*depths[:-1], middle)]
        if sized
        else middle,
        "cross_attention_dim": part.side(block, 1) if middle else XL_CONTEXT,
        "use_linear_projection": linear,
        **_told_sizes(part),
        "attention_head_dim": [max(1, width // 64) for width in widths] if linear else 8,
        "conditioning_channels": part.side("input_hint_block.0.weight", 1),
        "conditioning_embedding_out_channels": embedding,
    }


def _levels(part: Shapes) -> list[list[tuple[int, int | None]]]:
    """Width and depth of attention of a U-Net's way down, layer by layer; None is no attention.

    Raises:
        UserError: the layers of a level differ.
    """
    levels: list[list[tuple[int, int | None]]] = [[]]
    number = 1
    while f"input_blocks.{number}.0.op.weight" in part or _resnet(number) in part:
        if f"input_blocks.{number}.0.op.weight" in part:
            levels.append([])
        else:
            depth = _depth(part, f"input_blocks.{number}.1")
            levels[-1].append((part.side(_resnet(number), 0), depth))
        number += 1
    if len({len(level) for level in levels}) > 1 or any(len(set(level)) != 1 for level in levels):
        raise UserError("the layers of its U-Net differ within a level, which does not load here.")
    return levels


def _depth(part: Shapes, transformer: str) -> int | None:
    """The number of blocks of a transformer; None where there is none."""
    if f"{transformer}.proj_in.weight" not in part:
        return None
    return part.count(transformer + ".transformer_blocks.{}.norm1.weight")


def _down_types(depths: Sequence[int | None]) -> list[str]:
    return ["DownBlock2D" if depth is None else "CrossAttnDownBlock2D" for depth in depths]


def _told_sizes(part: Shapes) -> Config:
    """Config of what a network is told besides times and states: sizes, in those of XL."""
    sized = "label_emb.0.0.weight" in part
    return {
        "addition_embed_type": "text_time" if sized else None,
        "addition_time_embed_dim": XL_WAVES if sized else None,
        "projection_class_embeddings_input_dim": part.side("label_emb.0.0.weight", 1)
        if sized
        else None,
    }


def _resnet(number: int) -> str:
    return f"input_blocks.{number}.0.out_layers.3.weight"


def vae_config(
    shapes: Mapping[str, tuple[int, ...]], prefix: str = VAE, scale: float = 0.18215
) -> Config:
    """Infer the config of `AutoencoderKL`, of the tensors with this prefix, whose latents are
    scaled as those of Stable Diffusion 1 and 2 unless `scale` is another's."""
    part = Shapes(shapes, prefix)
    levels = part.count("encoder.down.{}.block.0.conv1.weight")
    widths = [part.side(f"encoder.down.{n}.block.0.conv1.weight", 0) for n in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": part.side("encoder.conv_in.weight", 1),
        "out_channels": part.side("decoder.conv_out.weight", 0),
        "latent_channels": part.side("decoder.conv_in.weight", 1),
        "block_out_channels": widths,
        "layers_per_block": part.count("encoder.down.0.block.{}.conv1.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": scale,
    }


def text_config(shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """Infer the config of `CLIPTextModel`: OpenAI's CLIP in version 1, OpenCLIP in version 2."""
    if any(name.startswith(OPEN_CLIP) for name in shapes):
        config = clip_config(shapes, OPEN_CLIP, open_clip=True)
        if config["num_hidden_layers"] == 24:  # version 2 looks at the last layer but one
            config["num_hidden_layers"] = 23
        return config
    prefix = CLIP if any(name.startswith(CLIP) for name in shapes) else CLIP_OLD
    return clip_config(shapes, prefix, open_clip=False)


def clip_config(shapes: Mapping[str, tuple[int, ...]], prefix: str, *, open_clip: bool) -> Config:
    """Infer the config of `CLIPTextModel`, of the tensors with this prefix in either spelling."""
    part = Shapes(shapes, prefix)
    if open_clip:
        layers = part.count("transformer.resblocks.{}.ln_1.weight")
        names = ("token_embedding.weight", "positional_embedding")
        wide, kind = part.side("transformer.resblocks.0.mlp.c_fc.weight", 0), "gelu"
    else:
        layers = part.count("encoder.layers.{}.layer_norm1.weight")
        names = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
        wide, kind = part.side("encoder.layers.0.mlp.fc1.weight", 0), "quick_gelu"
    width = part.side(names[0], 1)
    projected = {}
    if "text_projection" in part:
        projected["projection_dim"] = part.side("text_projection", 1)
    return {
        **projected,
        "model_type": "clip_text_model",
        "vocab_size": part.side(names[0], 0),
        "max_position_embeddings": part.side(names[1], 0),
        "hidden_size": width,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "hidden_act": kind,
    }


CLIP_OLD = CLIP.removesuffix("text_model.")
"""The prefix in a few old files."""


def scheduler_config(prediction: str, zero_snr: bool = False) -> Config:
    """Give the scheduler config that Stable Diffusion 1 and 2 were trained with.

    Args:
        prediction: in diffusers' words.
        zero_snr: whether the schedule was rescaled to end in noise alone (Lin et al. 2024).
    """
    if zero_snr:
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": prediction,
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "set_alpha_to_one": False,
            "clip_sample": False,
        }
    return {
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": prediction,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "clip_sample": False,
    }


def xl_scheduler_config(prediction: str, zero_snr: bool = False) -> Config:
    """Give the scheduler config that Stable Diffusion XL was published with; see the one above."""
    config = scheduler_config(prediction, zero_snr)
    leave = ("set_alpha_to_one", "skip_prk_steps", "clip_sample")
    if not zero_snr:
        config = {key: value for key, value in config.items() if key not in leave}
        config |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    return config


MODEL_SPEC_PREDICTION = "modelspec.prediction_type"
MODEL_SPEC_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
"""Predictions in diffusers' words and in those of the ModelSpec standard."""


def declared_prediction(metadata: Mapping[str, str]) -> str | None:
    """Read the prediction type from a header that follows the ModelSpec standard, or None."""
    kinds = {theirs: ours for ours, theirs in MODEL_SPEC_PREDICTIONS.items()}
    return kinds.get(metadata.get(MODEL_SPEC_PREDICTION, "").lower())


def declared_size(metadata: Mapping[str, str]) -> int | None:
    """Side of the latents that the header tells by the ModelSpec standard ("768x768")."""
    found = re.fullmatch(r"(\d{2,4})(x\d{2,4})?", metadata.get("modelspec.resolution", "").strip())
    return int(found[1]) // 8 if found and int(found[1]) >= 64 else None

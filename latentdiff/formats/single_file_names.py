"""The names of layers in single-file checkpoints, beside those in diffusers' networks.

CompVis' latent-diffusion counts blocks from one end of the U-Net to the other, where diffusers
counts levels and layers. Each table here maps prefixes of the names of diffusers to those of a
single file, for any number of levels and layers.
"""

from collections.abc import Mapping, Sequence

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CONTROL = "control_model."
CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."
XL_CLIP = "conditioner.embedders.0.transformer.text_model."
XL_OPEN_CLIP = "conditioner.embedders.1.model."
REFINER_OPEN_CLIP = "conditioner.embedders.0.model."

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Tensors that say by their names what the network predicts, and that the schedule ends in noise
alone: A1111, Forge and ComfyUI look for them."""

VAE_LEFTOVERS = ("loss.", "model_ema.")
"""Beginnings of names of what an autoencoder's training leaves beside it; A1111 drops them, too."""

Table = Mapping[str, str]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def renamed(name: str, table: Table) -> str | None:
    """A name with its longest known prefix replaced; None if it has none."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if (new := table.get(".".join(parts[:count]))) is not None:
            return ".".join([new, *parts[count:]])
    return None


def inverse(table: Table) -> Table:
    """The table for the way back."""
    return {theirs: ours for ours, theirs in table.items()}


def unet_table(layers: int, attention: Sequence[bool]) -> Table:
    """Names of a U-Net of `layers` a level, and attention in some of its levels, from the top."""
    table = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embed.cond_proj",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
    }
    _resnet(table, "mid_block.resnets.0", "middle_block.0")
    _resnet(table, "mid_block.resnets.1", "middle_block.2")
    levels = len(attention)
    for level in range(levels):
        first = 1 + level * (layers + 1)
        for layer in range(layers):
            down = f"down_blocks.{level}"
            _resnet(table, f"{down}.resnets.{layer}", f"input_blocks.{first + layer}.0")
            table[f"{down}.attentions.{layer}"] = f"input_blocks.{first + layer}.1"
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
        first = level * (layers + 1)
        for layer in range(layers + 1):
            up = f"up_blocks.{level}"
            _resnet(table, f"{up}.resnets.{layer}", f"output_blocks.{first + layer}.0")
            table[f"{up}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        place = 2 if attention[levels - 1 - level] else 1
        table[f"up_blocks.{level}.upsamplers.0.conv"] = (
            f"output_blocks.{first + layers}.{place}.conv"
        )
    return table


def control_table(layers: int, attention: Sequence[bool], embedding: int) -> Table:
    """Names of a ControlNet, as lllyasviel's: the U-Net's way down, and what it has of its own.

    Args:
        layers: of a level.
        attention: see `unet_table`.
        embedding: number of widths that a control picture goes through.
    """
    above = ("up_blocks.", "conv_norm_out", "conv_out")
    table = {
        ours: theirs
        for ours, theirs in unet_table(layers, attention).items()
        if not ours.startswith(above)
    }
    for number in range(len(attention) * (layers + 1)):
        table[f"controlnet_down_blocks.{number}"] = f"zero_convs.{number}.0"
    table["controlnet_mid_block"] = "middle_block_out.0"
    table["controlnet_cond_embedding.conv_in"] = "input_hint_block.0"
    count = 2 * (embedding - 1)
    for number in range(count):
        table[f"controlnet_cond_embedding.blocks.{number}"] = f"input_hint_block.{2 * number + 2}"
    table["controlnet_cond_embedding.conv_out"] = f"input_hint_block.{2 * count + 2}"
    return table


def _resnet(table: dict[str, str], ours: str, theirs: str) -> None:
    for part, name in _RESNET.items():
        table[f"{ours}.{part}"] = f"{theirs}.{name}"


def vae_table(layers: int, levels: int) -> Table:
    """Names of an autoencoder of `layers` a level in the encoder and one more in the decoder."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        table[f"{side}.conv_in"] = f"{side}.conv_in"
        table[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        table[f"{side}.conv_out"] = f"{side}.conv_out"
        for number in (0, 1):
            _vae_resnet(
                table, f"{side}.mid_block.resnets.{number}", f"{side}.mid.block_{number + 1}"
            )
        for part, name in _VAE_ATTENTION.items():
            table[f"{side}.mid_block.attentions.0.{part}"] = f"{side}.mid.attn_1.{name}"
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for layer in range(layers):
            _vae_resnet(table, f"{down}.resnets.{layer}", f"encoder.down.{level}.block.{layer}")
        for layer in range(layers + 1):
            _vae_resnet(table, f"{up}.resnets.{layer}", f"decoder.up.{level}.block.{layer}")
        table[f"{down}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        table[f"{up}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    return table


def _vae_resnet(table: dict[str, str], ours: str, theirs: str) -> None:
    for part in ("norm1", "conv1", "norm2", "conv2"):
        table[f"{ours}.{part}"] = f"{theirs}.{part}"
    table[f"{ours}.conv_shortcut"] = f"{theirs}.nin_shortcut"


def open_clip_table(layers: int) -> Table:
    """Names of OpenCLIP's text encoder, but for the joined query, key and value."""
    table = {
        "text_projection.weight": "text_projection",
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
    }
    for layer in range(layers):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        table[f"{ours}.layer_norm1"] = f"{theirs}.ln_1"
        table[f"{ours}.layer_norm2"] = f"{theirs}.ln_2"
        table[f"{ours}.mlp.fc1"] = f"{theirs}.mlp.c_fc"
        table[f"{ours}.mlp.fc2"] = f"{theirs}.mlp.c_proj"
        table[f"{ours}.self_attn.out_proj"] = f"{theirs}.attn.out_proj"
        for kind in ("weight", "bias"):
            table[f"{ours}.self_attn.in_proj_{kind}"] = f"{theirs}.attn.in_proj_{kind}"
    return table

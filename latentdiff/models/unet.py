"""A fresh latent U-Net, which begins as one of diffusers does."""

import json

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from latentdiff.models.cross_attention_unet import CrossAttentionUNet


def build_unet(
    latent_channels: int,
    latent_size: int,
    channels: tuple[int, ...],
    layers: int,
    attention: tuple[bool, ...],
    head_dim: int,
    text_width: int,
    learned_variance: bool = False,
    low_resolution: bool = False,
) -> CrossAttentionUNet:
    """A fresh U-Net with cross-attention at the levels that `attention` says.

    Args:
        latent_size: side of the latent grid that it is trained on.
        head_dim: width of one attention head.
        text_width: D of the text states [B, L, D].
        learned_variance: its output has 2C channels, of which the last C are v of eq. 15 of Nichol
            & Dhariwal 2021.
        low_resolution: it also sees a small RGB picture and the level of its noise.
    """
    if len(channels) != len(attention):
        raise ValueError(f"{len(channels)} levels of channels but {len(attention)} of attention")
    heads = tuple(max(1, width // head_dim) for width in channels)
    theirs = UNet2DConditionModel(  # with its first weights
        sample_size=latent_size,
        in_channels=latent_channels + (3 if low_resolution else 0),
        out_channels=latent_channels * (2 if learned_variance else 1),
        block_out_channels=channels,
        layers_per_block=layers,
        # diffusers reads `attention_head_dim` as the number of heads (its issue 2011).
        attention_head_dim=heads,  # pyright: ignore[reportArgumentType]
        cross_attention_dim=text_width,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]),
        norm_num_groups=32,
        class_embed_type="timestep" if low_resolution else None,
    )
    unet = CrossAttentionUNet(json.loads(theirs.to_json_string()))
    unet.load_state_dict(theirs.state_dict(), assign=True)
    return unet

"""ControlNets: Zhang et al. 2023 (Adding Conditional Control to Text-to-Image Diffusion Models)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from latentdiff.models.cross_attention_unet import CrossAttentionUNet, Encoder

# Keys that a ControlNet shares with the U-Net that it is a copy of.
_SHARED = (
    *("in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "block_out_channels"),
    *("layers_per_block", "norm_num_groups", "norm_eps", "cross_attention_dim"),
    *("transformer_layers_per_block", "attention_head_dim", "use_linear_projection"),
    *("upcast_attention", "addition_embed_type", "addition_time_embed_dim"),
    *("projection_class_embeddings_input_dim", "addition_embed_type_num_heads"),
)
_SAME = (
    *("only_cross_attention", "downsample_padding", "mid_block_scale_factor"),
    *("act_fn", "encoder_hid_dim", "encoder_hid_dim_type", "num_attention_heads"),
    "resnet_time_scale_shift",
)


class ControlNet(Encoder):
    """A copy of a U-Net's way down that sees a control picture, and what it says to the U-Net.

    Attributes:
        config: every key of diffusers' ControlNetModel.

    Args:
        config: one that `understands` accepts.
    """

    diffusers_name = "ControlNetModel"
    choices: ClassVar[Mapping[str, Any]] = {
        **{key: CrossAttentionUNet.choices[key] for key in _SHARED},
        "conditioning_channels": 3,
        "controlnet_conditioning_channel_order": "rgb",
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "global_pool_conditions": False,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    }
    fixed: ClassVar[Mapping[str, Any]] = {
        **{key: CrossAttentionUNet.fixed[key] for key in _SAME},
        "class_embed_type": None,
        "num_class_embeds": None,
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.controlnet_cond_embedding = ControlEmbedding(
            self.config["conditioning_channels"],
            self.config["conditioning_embedding_out_channels"],
            self._widths[0],
        )
        wide = [self._widths[0]]
        for level, width in enumerate(self._widths):
            layers: int = self._levels["layers_per_block"][level]
            wide += [width] * (layers + (level < len(self._widths) - 1))
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(w, w, 1) for w in wide)
        self.controlnet_mid_block = nn.Conv2d(self._widths[-1], self._widths[-1], 1)
        self._upcast()

    @classmethod
    def understands(cls, config: Mapping[str, Any]) -> bool:
        order = config.get("controlnet_conditioning_channel_order", "rgb")
        return order in ("rgb", "bgr") and super().understands(config)

    @classmethod
    def odd(cls, config: Mapping[str, Any]) -> str:
        """The first key that `understands` does not take, with its value, for a message."""
        known = {**cls.choices, **cls.fixed}
        plain = {key: value for key, value in config.items() if not key.startswith("_")}
        key = next(
            (k for k in plain if k not in known or not cls.understands({k: plain[k]})), "its config"
        )
        return f"{key} {plain.get(key, '')!s:.60}".strip()

    @classmethod
    def beside(
        cls,
        unet: CrossAttentionUNet,
        embedding: Sequence[int],
        channels: int,
        *,
        attention: bool = True,
        seed: int = 0,
    ) -> "ControlNet":
        """A ControlNet that says nothing yet: the U-Net's own way down, and zeros behind it.

        Zhang et al. 2023, section 3.1: a copy that is trained, and convolutions of zeros.

        Args:
            unet: the network that it shall control.
            embedding: widths of the layers that a control picture goes through; each after the
                first halves it.
            channels: C of the latents: what the U-Net sees beside x is not shown to it.
            attention: whether transformers are copied, too; without them it is smaller, as the
                small ControlNets of Stable Diffusion XL are.
            seed: of the weights of the layers that a control picture goes through (He et al. 2015).
        """
        config = {key: unet.config[key] for key in _SHARED} | {"in_channels": channels}
        config["conditioning_embedding_out_channels"] = list(embedding)
        if not attention:
            config["down_block_types"] = ["DownBlock2D"] * len(unet.config["block_out_channels"])
            config["mid_block_type"] = "UNetMidBlock2D"
        with torch.device("meta"):
            made = cls(config)
        source, random = unet.state_dict(), torch.Generator().manual_seed(seed)
        values: dict[str, Tensor] = {}
        for name, value in made.state_dict().items():
            if name in source:
                values[name] = source[name].detach().clone()
                continue
            values[name] = torch.zeros(value.shape)
            if ".conv_out." not in name and "cond_embedding." in name and value.ndim == 4:
                nn.init.kaiming_normal_(values[name], nonlinearity="relu", generator=random)
        values["conv_in.weight"] = values["conv_in.weight"][:, :channels].clone()
        made.load_state_dict(values, assign=True)
        return made.to(next(unet.parameters()))

    def embed(self, picture: Tensor) -> Tensor:
        """A control picture [B, 3, H, W] in [0, 1] as the blocks are shown it [B, W, h, w]."""
        if self.config["controlnet_conditioning_channel_order"] == "bgr":
            picture = picture.flip(1)
        return self.controlnet_cond_embedding(picture)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        embedded: Tensor,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """What is added to the U-Net's skips, and behind its middle block.

        Args:
            sample: x_t [B, C, H, W].
            timestep: times [B].
            encoder_hidden_states: text states [B, S, D].
            embedded: the control, of `embed`.
            encoder_attention_mask: bool [B, S], True where the network may look.
            added_cond_kwargs: see `CrossAttentionUNet`.
        """
        given = self._given(sample, encoder_hidden_states, encoder_attention_mask, None)
        time = self.time_act(self._time(sample, timestep, None, added_cond_kwargs))
        skips = self._down(self.conv_in(sample) + embedded, time, given)
        middle = self.controlnet_mid_block(self.mid_block(skips[-1], time, *given))
        told = zip(self.controlnet_down_blocks, skips, strict=True)
        return [layer(skip) for layer, skip in told], middle


class ControlEmbedding(nn.Module):
    """A control picture [B, 3, H, W] brought to the size and the width of the latents' maps.

    Args:
        channels: of the picture.
        widths: of the layers; each after the first halves the picture.
        outside: of the maps.
    """

    def __init__(self, channels: int, widths: Sequence[int], outside: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for inside, width in pairwise(widths):
            self.blocks.append(nn.Conv2d(inside, inside, 3, padding=1))
            self.blocks.append(nn.Conv2d(inside, width, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], outside, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        x = silu(self.conv_in(picture))
        for layer in self.blocks:
            x = silu(layer(x))
        return self.conv_out(x)

"""The U-Net of Stable Diffusion, with the tensor names of diffusers' UNet2DConditionModel."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from latentdiff.models.attention import AttentionLayer
from latentdiff.models.blocks import (
    BasicTransformerBlock,
    Downsample,
    ResnetBlock2D,
    TimeEmbedding,
    Transformer,
    Upsample,
    run,
    sinusoids,
)

_CROSSING = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_MIDDLES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")
_CROSSING |= {"CrossAttnUpBlock2D": True, "UpBlock2D": False}

_CHOICES: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "upcast_attention": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "addition_embed_type_num_heads": 64,
    "time_cond_proj_dim": None,
    "class_embed_type": None,
    "num_class_embeds": None,
}
_FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}


class Encoder(nn.Module):
    """A U-Net's way down with its middle, which U-Nets and ControlNets have.

    Attributes:
        config: every key of the class of diffusers that has these tensors.

    Args:
        config: the keys of a file; others have the values in `choices` and `fixed`.
    """

    diffusers_name: ClassVar[str]
    choices: ClassVar[Mapping[str, Any]]  # what a config may choose, with diffusers' own defaults
    fixed: ClassVar[Mapping[str, Any]]  # what it must leave alone: other values are other networks

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        known = {**self.choices, **self.fixed}
        self.config = {key: config.get(key, default) for key, default in known.items()}
        widths, levels = self.config["block_out_channels"], len(self.config["block_out_channels"])
        self._widths, self._time_width = widths, 4 * widths[0]
        self._levels = {k: _each(self.config[k], levels) for k in _PER_LEVEL if k in self.config}
        self.conv_in = nn.Conv2d(self.config["in_channels"], widths[0], 3, padding=1)
        told = self.config.get("time_cond_proj_dim")
        self.time_embedding = TimeEmbedding(widths[0], self._time_width, told)
        if self.config["addition_embed_type"] is not None:
            inside = self.config["projection_class_embeddings_input_dim"]
            self.add_embedding = TimeEmbedding(inside, self._time_width)
        self.class_embedding = _class_embedding(self.config, widths[0], self._time_width)
        self.time_act = nn.SiLU()
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()  # of U-Nets alone; parameters keep their order so
        inside = widths[0]
        for level, width in enumerate(widths):
            ins = [inside, *[width] * (self._levels["layers_per_block"][level] - 1)]
            given = self._block(self._levels["down_block_types"][level], level)
            self.down_blocks.append(DownBlock(ins, width, *given, last=level == levels - 1))
            inside = width
        groups, eps, time, _ = self._block("DownBlock2D", levels - 1)
        middle = None  # of the smallest ControlNets of Stable Diffusion XL
        if self.config["mid_block_type"] == "UNetMidBlock2DCrossAttn":
            middle = self._attention(levels - 1)
        self.mid_block = MidBlock(widths[-1], groups, eps, time, middle)

    def _attention(self, level: int) -> dict[str, Any]:
        """The settings of the transformers of a level."""
        each = self._levels
        return {
            "heads": each["attention_head_dim"][level],
            "depth": each["transformer_layers_per_block"][level],
            "context": each["cross_attention_dim"][level],
            "linear": self.config["use_linear_projection"],
        }

    def _block(self, kind: str, level: int) -> tuple[int, float, int, dict[str, Any] | None]:
        """Groups, eps, width of the time and the attention of a block of this kind."""
        attention = self._attention(level) if _CROSSING[kind] else None
        groups, eps = self.config["norm_num_groups"], self.config["norm_eps"]
        return groups, eps, self._time_width, attention

    def _upcast(self) -> None:
        for layer in self.modules():
            if hasattr(layer, "upcast"):
                layer.upcast = self.config["upcast_attention"]

    @classmethod
    def understands(cls, config: Mapping[str, Any]) -> bool:
        """True for a config of a network that this class is, to the last key."""
        types = [*config.get("down_block_types", ()), *config.get("up_block_types", ())]
        known = cls.choices.keys() | cls.fixed.keys()
        return (
            all(config.get(key, value) == value for key, value in cls.fixed.items())
            and all(name in _CROSSING for name in types)
            and config.get("mid_block_type", _MIDDLES[0]) in _MIDDLES
            and config.get("addition_embed_type") in (None, "text_time")
            and config.get("class_embed_type") in (None, "timestep")
            and config.get("norm_num_groups", 32) is not None
            and all(key in known or key.startswith("_") for key in config)
            and all(_depths_are_numbers(config.get("transformer_layers_per_block", 1)))
        )

    def enable_gradient_checkpointing(self) -> None:
        """Compute blocks anew in the backward pass, so that their insides need no memory."""
        for block in self.modules():
            if isinstance(block, ResnetBlock2D | BasicTransformerBlock):
                block.checkpointing = True

    def _given(
        self,
        sample: Tensor,
        states: Any,
        mask: Tensor | None,
        spoilt: Any,
        images: Any = (),
    ) -> tuple[Any, Tensor | None, Any, Any]:
        """What every block is told of states [B, S, D] and their mask, bool [B, S]."""
        if mask is not None:
            mask = (1 - mask.to(sample.dtype))[:, None, None] * -10000.0
        return states, mask, spoilt, images

    def _time(
        self,
        sample: Tensor,
        t: Any,
        scale: Tensor | None,
        added: Mapping[str, Tensor] | None,
        label: Tensor | None = None,
    ) -> Tensor:
        """The embedding of time, and of guidance, label, pooled text and sizes where there are any:
        [B, time]."""
        t = torch.as_tensor(t, device=sample.device).expand(len(sample))
        time = self.time_embedding(
            self._waves(t, self.config["block_out_channels"][0]).to(sample.dtype), scale
        )
        if self.class_embedding is not None:
            time = time + self.class_embedding(self._label(label, sample)).to(time)
        if added is None or self.config["addition_embed_type"] is None:
            return time
        sizes = self._waves(
            added["time_ids"].flatten(), self.config["addition_time_embed_dim"]
        ).reshape(len(sample), -1)
        return time + self.add_embedding(torch.cat([added["text_embeds"], sizes], -1).to(time))

    def _label(self, label: Tensor | None, sample: Tensor) -> Tensor:
        """A label [B] as its embedding takes it: its waves [B, width], or the label itself."""
        if label is None:
            raise ValueError("class_labels must be given to a network with a class embedding")
        label = label.to(sample.device).expand(len(sample))
        if self.config["class_embed_type"] is None:
            return label
        return self._waves(label, self.config["block_out_channels"][0]).to(sample.dtype)

    def _waves(self, t: Tensor, width: int) -> Tensor:
        """See `sinusoids`."""
        flip, shift = self.config["flip_sin_to_cos"], self.config["freq_shift"]
        return sinusoids(t, width, flip=flip, shift=shift)

    def _down(
        self, x: Tensor, time: Tensor, given: Sequence[Any], levels: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """The skips of the way down, from x behind the first convolution: the last is the end.

        What is there for each of the `levels` is added at its end.
        """
        skips = [x]
        for block, added in zip_longest(self.down_blocks, levels[: len(self.down_blocks)]):
            x, more = block(x, time, *given, added=added)
            skips += more
        return skips


class CrossAttentionUNet(Encoder):
    """A U-Net whose levels attend to text states: Rombach et al. 2022, sec. 3.3.

    Attributes:
        config: every key of diffusers' UNet2DConditionModel.

    Args:
        config: one that `understands` accepts.
    """

    diffusers_name = "UNet2DConditionModel"
    choices = _CHOICES
    fixed = _FIXED
    draws = False  # whether `timestep_cond` is noise

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        widths, levels = self._widths, len(self._widths)
        layers, kinds = (self._levels[key] for key in ("layers_per_block", "up_block_types"))
        skips = [widths[0]]
        for level, width in enumerate(widths):
            skips += [width] * (layers[level] + (level < levels - 1))
        inside = widths[-1]
        for place, level in enumerate(reversed(range(levels))):
            width = widths[level]
            ins = [inside, *[width] * layers[level]]
            ins = [each_in + skips.pop() for each_in in ins]
            given = self._block(kinds[place], level)
            self.up_blocks.append(UpBlock(ins, width, *given, last=level == 0))
            inside = width
        groups, eps = self.config["norm_num_groups"], self.config["norm_eps"]
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=eps)
        self.conv_out = nn.Conv2d(widths[0], self.config["out_channels"], 3, padding=1)
        self._upcast()
        for number, layer in enumerate(self.cross_attention()):
            layer.number = number

    def cross_attention(self) -> list[AttentionLayer]:
        """The layers that attend to states, in the order of diffusers' `attn_processors`."""
        layers = (each for each in self.modules() if isinstance(each, AttentionLayer))
        return [layer for layer in layers if layer.is_cross_attention]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Any,
        encoder_attention_mask: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Predict; the arguments have diffusers' names.

        Args:
            sample: x_t [B, C, H, W], with what the network sees beside it.
            timestep: times [B] or a number; or what `embed_time` makes of them.
            encoder_hidden_states: text states [B, S, D].
            encoder_attention_mask: bool [B, S], True where the network may look.
            timestep_cond: the guidance scale [B, G] of a network that was distilled with it; of a
                generator its noise.
            class_labels: labels [B], whole numbers, of a network with a class embedding.
            cross_attention_kwargs: "spoilt": see `latentdiff.models.perturbation`; "images":
                `ImageTokens` that it attends to beside the states.
            added_cond_kwargs: "text_embeds" [B, P] and "time_ids" [B, 6], as of SDXL.
            down_block_additional_residuals: added to the skips, in their order: of a ControlNet.
            mid_block_additional_residual: added behind the middle block.
            down_intrablock_additional_residuals: added at the end of each level on the way down,
                and of the middle where there is one more: of a T2I-Adapter.

        Returns:
            [B, out_channels, H, W].
        """
        told = cross_attention_kwargs or {}
        spoilt, images = told.get("spoilt"), told.get("images", ())
        given = self._given(sample, encoder_hidden_states, encoder_attention_mask, spoilt, images)
        time = timestep
        if not (isinstance(timestep, Tensor) and timestep.ndim == 2):
            numbers = timestep_cond, class_labels, added_cond_kwargs
            time = self.embed_time(sample, timestep, *numbers)
        levels = list(down_intrablock_additional_residuals or ())
        skips = self._down(self.conv_in(sample), time, given, levels)
        x = skips[-1]
        if down_block_additional_residuals is not None:
            skips = [a + b for a, b in zip(skips, down_block_additional_residuals, strict=True)]
        x = self.mid_block(x, time, *given)
        for level in levels[len(self.down_blocks) :]:
            x = x + level
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        for block in self.up_blocks:
            x = block(x, time, skips, *given)
        return self.conv_out(silu(self.conv_norm_out(x)))

    def embed_time(
        self,
        sample: Tensor,
        timestep: Any,
        timestep_cond: Tensor | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """What the blocks are told of the time and of all that is told beside it: [B, time]."""
        numbers = timestep_cond, added_cond_kwargs, class_labels
        return self.time_act(self._time(sample, timestep, *numbers))


class GeneratorUNet(CrossAttentionUNet):
    """A U-Net that makes one of many x_0 of x_t, as the noise says that it is told beside the time.

    The generator of a denoising diffusion GAN: Xiao et al. 2022. The noise [B, Z] is
    where other networks have their guidance scale, and `time_cond_proj_dim` is Z. No class of
    diffusers is one, so its config has a name of ours.
    """

    diffusers_name = "GeneratorUNet"
    draws = True


class EnergyUNet(CrossAttentionUNet):
    """A U-Net with a scalar head: the unnormalised log-density of x_t, whose gradient it gives.

    f(x) = <x, u(x) - x> / 2 with the U-Net's output u: for u = 0 it is standard normal, as standard
    latents nearly are in much noise. A network of homogeneous u is the score itself. No class of
    diffusers is one, so its config has a name of ours; its prediction is "score".
    """

    diffusers_name = "EnergyUNet"

    def log_density(self, sample: Tensor, *told: Any, **more: Any) -> Tensor:
        """f [B], up to a constant for each time, of x_t [B, C, H, W]; further arguments as those of
        `forward`."""
        inside = super().forward(sample, *told, **more)
        return 0.5 * (sample * (inside - sample)).flatten(1).sum(1)

    def forward(self, sample: Tensor, *told: Any, **more: Any) -> Tensor:
        """df / dx [B, C, H, W]; differentiable again where the sample requires its gradient."""
        again = torch.is_grad_enabled() and sample.requires_grad
        with torch.enable_grad():
            x = sample if again else sample.detach().requires_grad_()
            density = self.log_density(x, *told, **more)
            (score,) = torch.autograd.grad(density.sum(), x, create_graph=again)
        return score


def _class_embedding(config: Mapping[str, Any], inside: int, outside: int) -> nn.Module | None:
    """What embeds a label: two linear layers behind its waves, or a table with a row for each."""
    if config.get("class_embed_type") == "timestep":
        return TimeEmbedding(inside, outside)
    count = config.get("num_class_embeds")  # which a ControlNet of ours has not
    return None if count is None else nn.Embedding(count, outside)


class _Block(nn.Module):
    """Residual blocks of one level, each with a transformer behind it where the level attends."""

    def __init__(
        self,
        ins: Sequence[int],
        width: int,
        groups: int,
        eps: float,
        time: int,
        attention: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        if attention is not None:
            self.attentions = nn.ModuleList(
                Transformer(width, groups=groups, **attention) for _ in ins
            )
        else:
            self.attentions = None
        self.resnets = nn.ModuleList(ResnetBlock2D(i, width, groups, eps, time) for i in ins)

    def layer(self, number: int, x: Tensor, time: Tensor, *given: Any) -> Tensor:
        """One residual block and its transformer."""
        x = run(self.resnets[number], x, time)
        return x if self.attentions is None else self.attentions[number](x, *given)


class DownBlock(_Block):
    """One level on the way down; a last one keeps the size."""

    def __init__(
        self,
        ins: Sequence[int],
        width: int,
        groups: int,
        eps: float,
        time: int,
        attention: Mapping[str, Any] | None,
        *,
        last: bool,
    ) -> None:
        super().__init__(ins, width, groups, eps, time, attention)
        shrink = [] if last else [Downsample(width, padding=1)]
        self.downsamplers = nn.ModuleList(shrink)

    def forward(
        self, x: Tensor, time: Tensor, *given: Any, added: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The end of the level, and its skips.

        What is `added` is so before the level halves, but without attention behind: as diffusers.
        """
        skips: list[Tensor] = []
        for number in range(len(self.resnets)):
            x = self.layer(number, x, time, *given)
            skips.append(x)
        if added is not None and self.attentions is not None:
            x = skips[-1] = x + added
        for shrink in self.downsamplers:
            x = shrink(x)
            skips.append(x)
        if added is not None and self.attentions is None:
            x = skips[-1] = x + added
        return x, skips


class MidBlock(nn.Module):
    """The smallest level: a residual block, a transformer, a residual block; or the first alone."""

    def __init__(
        self, width: int, groups: int, eps: float, time: int, attention: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        told = [] if attention is None else [attention]
        self.attentions = nn.ModuleList(Transformer(width, groups=groups, **one) for one in told)
        self.resnets = nn.ModuleList(
            ResnetBlock2D(width, width, groups, eps, time) for _ in range(1 + len(told))
        )

    def forward(self, x: Tensor, time: Tensor, *given: Any) -> Tensor:
        x = run(self.resnets[0], x, time)
        for attend, block in zip(self.attentions, self.resnets[1:], strict=True):
            x = run(block, attend(x, *given), time)
        return x


class UpBlock(_Block):
    """One level on the way up, which is shown the skips of the way down."""

    def __init__(
        self,
        ins: Sequence[int],
        width: int,
        groups: int,
        eps: float,
        time: int,
        attention: Mapping[str, Any] | None,
        *,
        last: bool,
    ) -> None:
        super().__init__(ins, width, groups, eps, time, attention)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(width)])

    def forward(self, x: Tensor, time: Tensor, skips: list[Tensor], *given: Any) -> Tensor:
        for number in range(len(self.resnets)):
            x = self.layer(number, torch.cat([x, skips.pop()], dim=1), time, *given)
        for grow in self.upsamplers:
            x = grow(x, skips[-1].shape[-2:])
        return x


_PER_LEVEL = (
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "transformer_layers_per_block",
)


def _each(value: Any, count: int) -> list[Any]:
    """One value for each of `count` levels, whether there is one for all or a list."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{len(value)} values for {count} levels")
    return list(value)


def _depths_are_numbers(depths: Any) -> list[bool]:
    return [isinstance(depth, int) for depth in (depths if isinstance(depths, list) else [depths])]

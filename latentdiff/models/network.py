"""The network of a model: (x_t, t, condition) -> its prediction."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from latentdiff.diffusion.condition import Condition, Residuals
from latentdiff.diffusion.process import Process
from latentdiff.errors import UserError
from latentdiff.models.control import residuals
from latentdiff.models.perturbation import Perturbation, Spoilt, perturbable

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from latentdiff.models.cross_attention_unet import CrossAttentionUNet

Kind = Literal["text-to-image", "inpainting", "instruct-pix2pix", "upscaling"]
"""The input of a network: x_t; x_t, a mask and the masked picture; x_t and the picture to change;
or x_t and a small picture to enlarge."""

# What a run must give it, and what a user does about it.
NEEDS: dict[Kind, str] = {
    "text-to-image": "this model sees x_t alone: use RePaint or Blend in place of Inpaint, and "
    "SDEdit in place of Instruct.",
    "inpainting": "this is an inpainting model: it needs edits=[Inpaint(image, mask)], which is "
    "`latentdiff inpaint`.",
    "instruct-pix2pix": "this is an InstructPix2Pix model: it needs edits=[Instruct(image)], which "
    "is `latentdiff edit`.",
    "upscaling": "this is an upscaling model: it needs edits=[Enlarge(image)], which is "
    "`latentdiff enlarge`.",
}


@dataclass(frozen=True, slots=True, eq=False)
class LowResolution:
    """How the small pictures were made that an upscaling network was trained to enlarge.

    Attributes:
        process: the noise that is added to them: at level s, y_s = alpha_s y + sigma_s eps.
        max_noise_level: the highest level; 0 is the lowest.
        ratio: how many times larger what it draws is, along a side.
        residual: whether it draws what the picture, enlarged by Lanczos's filter, lacks, and not
            the picture (Li et al. 2022, SRDiff).
    """

    process: Process
    max_noise_level: int
    ratio: int
    residual: bool = False


class Network(Protocol):
    """A denoising network, with its facts declared. An engine is one that computes it faster."""

    @property
    def module(self) -> nn.Module:
        """The network's weights, to train, to save and to put a LoRA into."""
        ...

    @property
    def part(self) -> str:
        """Name of its folder in the diffusers layout: "unet" or "transformer"."""
        ...

    @property
    def channels(self) -> int:
        """C of the latents that it denoises."""
        ...

    @property
    def in_channels(self) -> int:
        """Channels of its input, those of `Condition.beside` included."""
        ...

    @property
    def learns_variance(self) -> bool:
        """True for an output of 2C channels, the last C of which tell the variance of a step."""
        ...

    @property
    def kind(self) -> Kind:
        """The kind of model, by the image condition that it takes beside x_t."""
        ...

    @property
    def low_resolution(self) -> LowResolution | None:
        """What the small pictures were that it enlarges; None of a network that does not."""
        ...

    @property
    def width(self) -> int:
        """D of the text states that it attends to."""
        ...

    @property
    def guidance_width(self) -> int | None:
        """G of `Condition.guidance_embedding` where its guidance is in it, by distillation."""
        ...

    @property
    def noise_width(self) -> int | None:
        """Z of `Condition.noise` where it is a generator, which makes one of many x_0 of x_t."""
        ...

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width, in latents, that it was trained on."""
        ...

    @property
    def multiple(self) -> int:
        """Sides in latents should be multiples of this, so that every level halves evenly."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int] = ()
    ) -> Tensor:
        """Predict from x_t: see `latentdiff.diffusion.denoiser.CallsNetwork`.

        Raises:
            UserError: the condition lacks what it sees beside x_t, or has too much.
        """
        ...

    def perturbable(self, perturbations: Sequence[Perturbation]) -> Self:
        """The same network, whose attention can be spoilt; this one stays as it is.

        Raises:
            UserError: a perturbation names a layer that is not there.
        """
        ...

    def with_module(self, module: nn.Module) -> Self:
        """The same network around other weights."""
        ...


@dataclass(frozen=True, eq=False)
class DiffusersUNet:
    """A U-Net with cross-attention, as Stable Diffusion 1 and 2 have it.

    Attributes:
        module: ours, or a network of diffusers.
        channels: C of the latents; the module may take C, 2C + 1 (inpainting: a mask and the masked
            picture's latents) or 2C (InstructPix2Pix), and give C or 2C.
        compiled: what is called in place of the module, if that came out of `torch.compile`: then
            the module is the one inside it, which is saved, takes a LoRA and is perturbed.

    Raises:
        UserError: other numbers of channels, or an input that no prompt tells.
    """

    # Keys of a config that ask for an input that nothing tells: sizes, classes, pictures, poses.
    refused: ClassVar[tuple[str, ...]] = (
        "addition_embed_type",
        "class_embed_type",
        "num_class_embeds",
    )

    module: "CrossAttentionUNet | UNet2DConditionModel"
    channels: int
    compiled: nn.Module | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if (inside := getattr(self.module, "_orig_mod", None)) is not None:
            object.__setattr__(self, "compiled", self.module)
            object.__setattr__(self, "module", inside)
        config = self.module.config
        inside, outside = config["in_channels"], config["out_channels"]
        if inside not in self._kinds() or outside not in (self.channels, 2 * self.channels):
            raise UserError(
                f"unet: it takes {inside} and gives {outside} channels, but the vae's latents have "
                f"{self.channels}; depth and such checkpoints do not work here."
            )
        for key in self.refused:
            if config[key] is not None:
                raise UserError(
                    f"unet: its {key} is {config[key]!s:.40}, as in Stable Diffusion XL and others "
                    "that are told more than a prompt: beside one text encoder nothing tells it."
                )
        if config["encoder_hid_dim_type"] not in (None, "text_proj"):
            kind = config["encoder_hid_dim_type"]
            raise UserError(f"unet: its encoder_hid_dim_type '{kind!s:.40}' does not work here.")
        sides = _each(config["sample_size"])
        if len(sides) > 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise UserError("unet: its sample_size does not say how large its pictures are.")

    def _kinds(self) -> dict[int, Kind]:
        """Map the number of input channels to the kind of model."""
        return {
            self.channels: "text-to-image",
            2 * self.channels + 1: "inpainting",
            2 * self.channels: "instruct-pix2pix",
        }

    @property
    def part(self) -> str:
        return "unet"

    @property
    def in_channels(self) -> int:
        return self.module.config["in_channels"]

    @property
    def learns_variance(self) -> bool:
        return self.module.config["out_channels"] == 2 * self.channels

    @property
    def kind(self) -> Kind:
        return self._kinds()[self.in_channels]

    @property
    def low_resolution(self) -> LowResolution | None:
        return None

    @property
    def width(self) -> int:
        config = self.module.config
        if config["encoder_hid_dim_type"] == "text_proj":
            return config["encoder_hid_dim"]
        widths = _each(config["cross_attention_dim"])
        if any(width != widths[0] for width in widths):
            raise UserError(f"unet: its levels attend to text states of other widths: {widths}.")
        return widths[0]

    @property
    def guidance_width(self) -> int | None:
        return None if self._draws else self.module.config["time_cond_proj_dim"]

    @property
    def noise_width(self) -> int | None:
        return self.module.config["time_cond_proj_dim"] if self._draws else None

    @property
    def _draws(self) -> bool:
        return getattr(self.module, "draws", False)  # diffusers' own class has no such thing

    @property
    def native_size(self) -> tuple[int, int]:
        sides = _each(self.module.config["sample_size"])
        return sides[0], sides[-1]

    @property
    def multiple(self) -> int:
        return 2 ** (len(self.module.config["block_out_channels"]) - 1)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def labels(self, condition: Condition) -> Tensor | None:
        """The `class_labels` of the module; a network that is told any overrides this."""
        return None

    def added(self, condition: Condition) -> dict[str, Tensor] | None:
        """The `added_cond_kwargs` of the module; a family whose U-Net takes any overrides this."""
        return None

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int] = ()
    ) -> Tensor:
        attention: dict[str, object] = {**spoilt_rows(x, perturbed)}
        if condition.images:
            attention["images"] = [
                replace(one, tokens=one.tokens.to(x.device, self.dtype)) for one in condition.images
            ]
        added = self.added(condition)
        told = residuals(condition, x.to(self.dtype), t, added) or Residuals()
        skips = told.skips
        if condition.beside is not None:
            x = torch.cat([x, condition.beside.to(x)], dim=1)
        if x.shape[1] != self.in_channels:
            raise UserError(
                f"the U-Net takes {self.in_channels} channels, not {x.shape[1]}: {NEEDS[self.kind]}"
            )
        states, mask, scale = condition.states, condition.mask, condition.guidance_embedding
        assert states is not None
        if (scale is None) != (self.guidance_width is None):
            raise UserError(
                "the U-Net is told the guidance scale, by Condition.guidance_embedding, where its "
                "time_cond_proj_dim says so, and only there."
            )
        if (condition.noise is None) != (self.noise_width is None):
            raise UserError(
                "a generator is told noise, by Condition.noise, at each call, and no other U-Net "
                "is: it is drawn with, and neither inverted nor trained as others are."
            )
        beside_time = condition.noise if scale is None else scale
        module: Any = self.module if self.compiled is None else self.compiled
        output = module(
            x.to(self.dtype),
            t,
            class_labels=self.labels(condition),
            timestep_cond=None if beside_time is None else beside_time.to(x.device, self.dtype),
            encoder_hidden_states=states.to(x.device, self.dtype),
            encoder_attention_mask=None if mask is None else mask.to(x.device),
            cross_attention_kwargs=attention or None,
            added_cond_kwargs=added,
            down_block_additional_residuals=skips[:-1] or None,
            mid_block_additional_residual=skips[-1] if skips else None,
            down_intrablock_additional_residuals=list(told.levels) if told.levels else None,
        )
        return getattr(output, "sample", output)  # diffusers puts it into an object

    def perturbable(self, perturbations: Sequence[Perturbation]) -> Self:
        return self.with_module(perturbable(self.module, perturbations))

    def with_module(self, module: Any) -> Self:
        return type(self)(module, self.channels)


@dataclass(frozen=True, eq=False)
class UpscalingUNet(DiffusersUNet):
    """A U-Net that sees a small RGB picture beside x_t and is told how much noise is in it.

    Ho et al. 2022 (CDM), section 4, as in Stable Diffusion's x4 upscaler: C + 3 channels in, and
    the level of the noise as a class label.

    Attributes:
        made: how its small pictures were made.

    Raises:
        UserError: the module is no such network.
    """

    refused: ClassVar[tuple[str, ...]] = ("addition_embed_type",)

    made: LowResolution

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.module.config
        if config["class_embed_type"] not in (None, "timestep") or (
            config["class_embed_type"] is None and config["num_class_embeds"] is None
        ):
            raise UserError(
                f"unet: its class_embed_type is {config['class_embed_type']!s:.40} and its "
                f"num_class_embeds {config['num_class_embeds']!s:.40}; an upscaling model has "
                "timestep, or a number of levels."
            )
        levels = config["num_class_embeds"]
        if config["class_embed_type"] is None and levels <= self.made.max_noise_level:
            raise UserError(
                f"unet: its num_class_embeds is {levels}, so no max_noise_level of "
                f"{self.made.max_noise_level} works."
            )

    def _kinds(self) -> dict[int, Kind]:
        return {self.channels + 3: "upscaling"}

    @property
    def low_resolution(self) -> LowResolution | None:
        return self.made

    def labels(self, condition: Condition) -> Tensor | None:
        if condition.noise_level is None:
            raise UserError(f"the U-Net is told a noise level: {NEEDS[self.kind]}")
        return condition.noise_level.to(self.device)

    def with_module(self, module: Any) -> Self:
        return type(self)(module, self.channels, self.made)


@dataclass(frozen=True, eq=False)
class SizedUNet(DiffusersUNet):
    """A U-Net that is also told pooled text and numbers about the picture, as Stable Diffusion XL.

    Raises:
        UserError: it is told something else, or likewise.
    """

    refused: ClassVar[tuple[str, ...]] = ("class_embed_type", "num_class_embeds")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (kind := self.module.config["addition_embed_type"]) != "text_time":
            raise UserError(
                f"unet: its addition_embed_type is {kind!s:.40}; text_time, as in Stable Diffusion "
                "XL, works beside two text encoders."
            )

    @property
    def told(self) -> tuple[int, int]:
        """The count of values that it is told in all, and of those that each number becomes."""
        config = self.module.config
        inside = config["projection_class_embeddings_input_dim"]
        return inside or 0, config["addition_time_embed_dim"] or 0

    def check_told(self, pooled: int | None, numbers: int) -> None:
        """Check that it is told a pooled vector of this width and so many numbers.

        Raises:
            UserError: it is told something else.
        """
        inside, each = self.told
        if inside != (pooled or 0) + numbers * each:
            raise UserError(
                f"unet: its projection_class_embeddings_input_dim is {inside}, but a pooled text "
                f"of {pooled} and {numbers} numbers in {each} waves each are "
                f"{(pooled or 0) + numbers * each}."
            )

    def added(self, condition: Condition) -> dict[str, Tensor] | None:
        pooled, sizes = condition.pooled, condition.sizes
        inside, each = self.told
        if pooled is None or sizes is None or pooled.shape[1] + sizes.shape[1] * each != inside:
            raise UserError(
                "the U-Net is also told a pooled text and the picture's sizes: a condition needs "
                "both, of its widths."
            )
        device = next(self.module.parameters()).device
        return {"text_embeds": pooled.to(device, self.dtype), "time_ids": sizes.to(device)}


def spoilt_rows(x: Tensor, perturbed: Sequence[int], patch: int = 1) -> dict[str, Spoilt]:
    """Of a module's `cross_attention_kwargs` for x [B, C, H, W] the perturbations of its parts.

    Args:
        perturbed: see `latentdiff.diffusion.denoiser.CallsNetwork`.
        patch: side of the patches that become the network's places.
    """
    if not perturbed:
        return {}
    rows = torch.tensor(perturbed).repeat_interleave(len(x) // len(perturbed))
    height, width = (-(-side // patch) for side in x.shape[-2:])
    return {"spoilt": Spoilt(rows.to(x.device), (height, width))}


def _each(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]

"""PixArt: its transformer as a network, and prompts, with sizes, as its condition."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from latentdiff.diffusion.condition import Condition
from latentdiff.errors import UserError
from latentdiff.models.conditioner import Encoded, SizeConditions, TextConditioner
from latentdiff.models.network import NEEDS, Kind, LowResolution, spoilt_rows
from latentdiff.models.perturbation import Perturbation, perturbable
from latentdiff.models.pixart_transformer import PixArtTransformer
from latentdiff.models.text_encoders import PLAIN, Reading, TextStates, Tokens


@dataclass(frozen=True, eq=False)
class PixArtNetwork:
    """A transformer as PixArt-alpha and PixArt-Sigma have it.

    Of an output of 2C channels the second half, a variance, is left out, as it is in diffusers'
    pipelines. Latents with sides that are no multiples of a patch are continued by their last row
    and column to the next multiple.

    Attributes:
        module: the transformer.
        channels: C of the latents.
        compiled: what is called in place of the module, if that came out of `torch.compile`: then
            the module is the one inside it.

    Raises:
        UserError: it takes or gives other numbers of channels.
    """

    module: PixArtTransformer
    channels: int
    compiled: nn.Module | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if (inside := getattr(self.module, "_orig_mod", None)) is not None:
            object.__setattr__(self, "compiled", self.module)
            object.__setattr__(self, "module", inside)
        inside, outside = self.module.config["in_channels"], self.module.out_channels
        if inside != self.channels or outside not in (self.channels, 2 * self.channels):
            raise UserError(
                f"transformer: it takes {inside} and gives {outside} channels, but the vae's "
                f"latents have {self.channels}."
            )

    @property
    def part(self) -> str:
        return "transformer"

    @property
    def in_channels(self) -> int:
        return self.channels

    @property
    def learns_variance(self) -> bool:
        return False

    @property
    def kind(self) -> Kind:
        return "text-to-image"

    @property
    def width(self) -> int:
        config = self.module.config
        return config["caption_channels"] or config["cross_attention_dim"]

    @property
    def low_resolution(self) -> LowResolution | None:
        return None

    @property
    def guidance_width(self) -> int | None:
        return None

    @property
    def noise_width(self) -> int | None:
        return None

    @property
    def native_size(self) -> tuple[int, int]:
        side = self.module.config["sample_size"]
        return side, side

    @property
    def multiple(self) -> int:
        return self.module.config["patch_size"]

    @property
    def device(self) -> torch.device:
        return self.module.scale_shift_table.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.scale_shift_table.dtype

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int] = ()
    ) -> Tensor:
        if condition.beside is not None:
            channels = x.shape[1] + condition.beside.shape[1]
            raise UserError(
                f"the transformer takes {self.channels} channels, not {channels}: "
                f"{NEEDS[self.kind]}"
            )
        if condition.control:
            raise UserError("controls: a ControlNet stands beside a U-Net, not a transformer.")
        if condition.images:
            raise UserError(
                "image_prompts: an IP-Adapter stands beside a U-Net, not a transformer."
            )
        states, mask = condition.states, condition.mask
        assert states is not None
        height, width = x.shape[-2:]
        rest = (0, -width % self.multiple, 0, -height % self.multiple)
        module: Any = self.module if self.compiled is None else self.compiled
        output = module(
            pad(x, rest, mode="replicate").to(self.dtype),
            encoder_hidden_states=states.to(x.device, self.dtype),
            timestep=t,
            added_cond_kwargs=self._sizes(condition, x),
            cross_attention_kwargs=spoilt_rows(x, perturbed, self.multiple) or None,
            encoder_attention_mask=None if mask is None else mask.to(x.device),
        )
        return output[:, : self.channels, :height, :width]

    def _sizes(self, condition: Condition, x: Tensor) -> dict[str, Tensor] | None:
        """The `added_cond_kwargs` of the module.

        Raises:
            UserError: the condition lacks them.
        """
        if not self.module.told_sizes:
            return None
        if condition.sizes is None:
            raise UserError("the transformer is told the picture's size: a condition needs sizes.")
        sizes = condition.sizes.to(x.device)
        return {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}

    def perturbable(self, perturbations: Sequence[Perturbation]) -> Self:
        return self.with_module(perturbable(self.module, perturbations))

    def with_module(self, module: Any) -> Self:
        return type(self)(module, self.channels)


@dataclass(frozen=True, eq=False)
class PixArtConditioner(TextConditioner):
    """A T5 encoder whose prompts are in lower case, as PixArt's are in training, and sizes.

    Attributes:
        told_sizes: whether the network is told the picture's size and its ratio of sides: Chen et
            al. 2023 (PixArt-alpha), sec. 2.4; of the model of 1024 pixels.
    """

    told_sizes: bool = False

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        return super().tokenize([prompt.lower() for prompt in prompts])

    def condition(self, text: TextStates, size: tuple[int, int]) -> Condition:
        return self.sized(super().condition(text, size), size, SizeConditions())

    def sized(
        self,
        condition: Condition,
        size: tuple[int, int],
        told: SizeConditions,
        *,
        negative: bool = False,
    ) -> Condition:
        """See `Conditioner.sized`. The numbers of a row are the height and width of the original
        picture, and the ratio of height to width of the target."""
        if not self.told_sizes:
            return super().sized(condition, size, told, negative=negative)
        for name in told.given():
            if name not in ("original_size", "target_size"):
                raise UserError(f"{name}: this model is not told it; leave it out.")
        height, width = told.target_size or size
        row = [*(told.original_size or size), height / width]
        assert condition.states is not None
        sizes = torch.tensor([row] * len(condition.states), dtype=torch.float32)
        return replace(condition, sizes=sizes.to(condition.states.device))

    def encode(
        self, prompts: Sequence[str], size: tuple[int, int], reading: Reading = PLAIN
    ) -> Encoded:
        return super().encode([prompt.lower() for prompt in prompts], size, reading)

"""What every engine has in common: it declares the facts of what it stands around."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.network import Kind, LowResolution, Network


@dataclass(frozen=True, eq=False)
class AroundNetwork:
    """A network with the facts of another.

    Attributes:
        inner: the other; its module has the weights.
    """

    inner: Network

    @property
    def module(self) -> nn.Module:
        return self.inner.module

    @property
    def part(self) -> str:
        return self.inner.part

    @property
    def channels(self) -> int:
        return self.inner.channels

    @property
    def in_channels(self) -> int:
        return self.inner.in_channels

    @property
    def learns_variance(self) -> bool:
        return self.inner.learns_variance

    @property
    def kind(self) -> Kind:
        return self.inner.kind

    @property
    def low_resolution(self) -> LowResolution | None:
        return self.inner.low_resolution

    @property
    def width(self) -> int:
        return self.inner.width

    @property
    def guidance_width(self) -> int | None:
        return self.inner.guidance_width

    @property
    def noise_width(self) -> int | None:
        return self.inner.noise_width

    @property
    def native_size(self) -> tuple[int, int]:
        return self.inner.native_size

    @property
    def multiple(self) -> int:
        return self.inner.multiple

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype


@dataclass(frozen=True, eq=False)
class AroundAutoencoder:
    """An autoencoder with the facts of another, which also makes latents of moments.

    Attributes:
        inner: the other; its module has the weights.
    """

    inner: Autoencoder

    @property
    def module(self) -> nn.Module:
        return self.inner.module

    @property
    def factor(self) -> int:
        return self.inner.factor

    @property
    def channels(self) -> int:
        return self.inner.channels

    @property
    def scaling_factor(self) -> float | None:
        return self.inner.scaling_factor

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """See `Autoencoder.draw`."""
        return self.inner.draw(moments, noise)

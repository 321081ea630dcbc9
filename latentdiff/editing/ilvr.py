"""ILVR: a run keeps the low frequencies of a reference."""

from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser, Estimate
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.editing.lowpass import low_pass, projection
from latentdiff.editing.run_context import (
    Finish,
    RunContext,
    latents_like,
    opened,
    pixels,
    size_of,
    unchanged,
)
from latentdiff.errors import UserError
from latentdiff.pictures import Picture
from latentdiff.registry import check_name

Space = Literal["latents", "pixels"]

_FACTOR = 4  # in latents: N where none is given


@dataclass(frozen=True, eq=False)
class ILVR:
    """Choi et al. 2021 (ILVR), algorithm 1, on latents; or the same on the decoded estimate.

    Args:
        reference: whose coarse shapes and colours to keep: a picture, opened here, or latents
            [1 or B, C, h, w]. Bound to a run in "pixels" it is [1, 3, H, W].
        factor: N, how much smaller the reference is made; finer detail is free. It counts latents,
            or in "pixels" pixels. None: 4 latents, or as many pixels as they cover.
        until: sigma / alpha below which the run is left to itself; 0 holds it to the last step.
        space: "latents" puts the low frequencies of the noised reference into x after each step;
            "pixels" those of the reference into each estimate of the picture, through the
            autoencoder (slower).
        context: the autoencoder, for "pixels"; the pipeline puts it there.

    Raises:
        UserError: a number out of range, an unknown space, or no picture.
    """

    reference: Picture | Tensor
    factor: int | None = None
    until: float = 0.0
    space: Space = "latents"
    context: RunContext | None = None

    def __post_init__(self) -> None:
        check_name("space", self.space, get_args(Space))
        if self.factor is not None and self.factor < 1:
            raise UserError(f"factor must be at least 1, not {self.factor}.")
        if not self.until >= 0:
            raise UserError(f"until is a sigma / alpha, so at least 0, not {self.until}.")
        object.__setattr__(self, "reference", opened(self.reference))

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """See `HoldsPicture`."""
        return size_of(self.reference)

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """See `HoldsPicture`."""
        if self.space == "latents":
            if isinstance(self.reference, Tensor):
                return self, unchanged
            return replace(self, reference=context.latents(pixels(self.reference))), unchanged
        if isinstance(self.reference, Tensor):
            reference = context.autoencoder.decode(self.reference)
        else:
            reference = context.pad(pixels(self.reference))
        return replace(self, reference=reference, context=context), unchanged

    def after(self, x: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor:
        """Eq. 8: x + phi(y - x), with y the reference at the level of x.

        phi is no projection, so that leaves some of the difference. The next steps see to it, but
        clean data have none: there the low frequencies are set exactly.
        """
        if self.space == "pixels" or level.ratio < self.until:
            return x
        y = level.alpha * latents_like(self.reference, x)
        if level.sigma == 0:
            return x + projection(y - x, self.factor or _FACTOR)
        return x + low_pass(y + level.sigma * noise.like(x) - x, self.factor or _FACTOR)

    def denoiser(self, denoise: Denoiser) -> Denoiser:
        """The denoiser whose estimates have, decoded, the low frequencies of the reference."""
        if self.space == "latents":
            return denoise
        if self.context is None:
            raise UserError("ILVR in pixels needs an autoencoder: run it in the pipeline.")
        autoencoder, reference = self.context.autoencoder, self.reference
        factor = self.factor or _FACTOR * autoencoder.factor
        assert isinstance(reference, Tensor)

        def corrected(x: Tensor, level: NoiseLevel) -> Estimate:
            estimate = denoise(x, level)
            if level.ratio < self.until:
                return estimate
            x0 = estimate.x0
            seen = autoencoder.decode(x0)
            wanted = seen + low_pass(reference.to(seen) - seen, factor)
            # The difference of two encodings: what the autoencoder itself loses cancels.
            change = autoencoder.encode(wanted) - autoencoder.encode(seen)
            return estimate.with_x0(x0 + change.to(x0))

        return corrected

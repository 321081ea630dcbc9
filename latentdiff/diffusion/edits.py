"""The touch points at which an edit steers a run. An edit is any object that has one or more.

Guidances by another model, thresholds and spoilt attention are edits as well as what keeps parts of
a picture: they differ in which touch points they have, and go into one list, in any combination.
"""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from latentdiff.diffusion.denoiser import ConditionedDenoiser, Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.timetable import Timetable


@runtime_checkable
class EditsTimetable(Protocol):
    """An edit that changes which levels are visited (SDEdit drops the first, RePaint jumps)."""

    def timetable(self, timetable: Timetable) -> Timetable: ...


@runtime_checkable
class EditsBegin(Protocol):
    """An edit that changes where the run begins: x [B, C, H, W] at timetable[0]."""

    def begin(self, x: Tensor, timetable: Timetable, noise: NoiseStreams) -> Tensor: ...


@runtime_checkable
class EditsAfter(Protocol):
    """An edit that corrects x [B, C, H, W] after each step towards the data, at its new level."""

    def after(self, x: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor: ...


@runtime_checkable
class EditsDenoiser(Protocol):
    """An edit that corrects each estimate of x_0, guidance included (ILVR in pixels, CLIP)."""

    def denoiser(self, denoise: Denoiser) -> Denoiser: ...


@runtime_checkable
class EditsBranches(Protocol):
    """An edit that corrects what the network says under each condition, before guidance (PAG, SEG).

    The pipeline asks for it, since it needs the network.
    """

    @property
    def perturbation(self) -> Any:
        """The change of the network's attention: see `latentdiff.models.perturbation`."""
        ...

    def branches(self, denoise: ConditionedDenoiser, number: int) -> ConditionedDenoiser:
        """The corrected denoiser; `number` is that of the perturbation in a `Branch`."""
        ...


@runtime_checkable
class EditsConditioned(Protocol):
    """An edit that changes how the network is asked under all conditions (`TiledDiffusion`)."""

    def conditioned(self, denoise: ConditionedDenoiser) -> ConditionedDenoiser:
        """Another way to ask; the pipeline puts it next to the network, within every guidance."""
        ...


@runtime_checkable
class EditsInput(Protocol):
    """An edit that shows the network more than x [B, C, H, W] (`Inpaint`, `Instruct`, `Enlarge`).

    This is part of the condition, which guidance takes, and so known before the run: the pipeline
    asks for it.
    """

    @property
    def image_guidance_scale(self) -> float:
        """Scale of the guidance by the picture shown: see `latentdiff.guidance.cfg`; 1 is off."""
        ...

    def beside(self, x: Tensor) -> Tensor:
        """[B, extra, H, W], behind the channels of x in the network's input."""
        ...


@runtime_checkable
class EditsNoiseLevel(EditsInput, Protocol):
    """An edit that also tells the network how much noise is in what it shows (`Enlarge`)."""

    def noise_levels(self, x: Tensor) -> Tensor:
        """The level of each row: int64 [B]."""
        ...


Edit = (
    EditsTimetable
    | EditsBegin
    | EditsAfter
    | EditsDenoiser
    | EditsConditioned
    | EditsBranches
    | EditsInput
)
"""Any object with at least one of the touch points."""

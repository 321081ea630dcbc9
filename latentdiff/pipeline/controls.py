"""Controls of a call: pictures that a ControlNet or a T2I-Adapter holds the model to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.diffusion.condition import Hint
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing import RunContext
from latentdiff.editing.control_pictures import check_kind, control_picture
from latentdiff.editing.jumps import first_visits
from latentdiff.errors import UserError, check_finite
from latentdiff.formats.controlnet import load_controlnet
from latentdiff.formats.t2i_adapter import is_t2i_adapter, load_t2i_adapter
from latentdiff.models.control import AdapterNetwork, ControlNetwork
from latentdiff.models.control_fit import check_control, check_maps
from latentdiff.pictures import Picture, open_picture, to_tensor


@dataclass(frozen=True, eq=False)
class Control:
    """A picture (edges, depth, a pose ...) and the network that was trained to hold to it.

    A ControlNet (Zhang et al. 2023) or a T2I-Adapter (Mou et al. 2023). Several add up, each with
    its own scale and stretch of the run.

    Args:
        network: a folder or .safetensors file, read here in float32; or what `load_controlnet` or
            `load_t2i_adapter` read, once for many calls and on the model's own device.
        image: the control picture, opened here, or a list of one for each prompt or picture. One
            of another size than the run is resized, and of another shape refused; with no other
            size given the run is as large as the first.
        scale: strength; 0 is off.
        start: from this part of the run on, in 0 .. 1, as `control_guidance_start` in diffusers.
        end: to this part of it.
        guess: guess mode of a ControlNet: the negative prompt's branch is not told, and large maps
            are told less.
        kind: what is made of the picture at the size of the run: "canny", "scribble", "grey",
            "palette" or "tile" (`latentdiff.editing.control_pictures`); or it is shown as it is.

    Raises:
        UserError: no such network, no picture, or a number out of range.
    """

    network: str | Path | ControlNetwork | AdapterNetwork
    image: Picture | Sequence[Picture]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    kind: str = "picture"

    def __post_init__(self) -> None:
        check_finite(self.scale, "control: scale")
        if not 0 <= self.start < self.end <= 1:
            raise UserError(
                f"control: start and end are parts of the run, 0 <= start < end <= 1, not "
                f"{self.start} and {self.end}."
            )
        check_kind(self.kind)
        given: Any = self.image if isinstance(self.image, list | tuple) else [self.image]
        if not given:
            raise UserError("control: its list of pictures is empty.")
        object.__setattr__(self, "image", [open_picture(one) for one in given])
        if not isinstance(self.network, ControlNetwork | AdapterNetwork):
            object.__setattr__(self, "network", load_network(self.network))
        if self.guess and isinstance(self.network, AdapterNetwork):
            raise UserError("control: guess mode is for ControlNets: a T2I-Adapter has none.")

    @property
    def pictures(self) -> list[Image.Image]:
        """The control pictures, opened."""
        pictures: Any = self.image
        return pictures

    @property
    def loaded(self) -> ControlNetwork | AdapterNetwork:
        """The network."""
        assert isinstance(self.network, ControlNetwork | AdapterNetwork)
        return self.network


def load_network(
    where: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ControlNetwork | AdapterNetwork:
    """Read a ControlNet or a T2I-Adapter: see `load_controlnet` and `load_t2i_adapter`.

    Raises:
        UserError: there is none, or it is damaged or of another kind.
    """
    load = load_t2i_adapter if is_t2i_adapter(where) else load_controlnet
    return load(where, device=device, dtype=dtype)


def check_controls(controls: Sequence[object]) -> None:
    """Check that a list holds controls.

    Raises:
        UserError: it holds something else.
    """
    for control in controls:
        if not isinstance(control, Control):
            raise UserError(f"controls: give Control(network, picture), not {control!r:.60}.")


def controls_size(controls: Sequence[Control]) -> tuple[int, int] | None:
    """Height and width of a run that nothing else tells the size of; None without controls."""
    if not controls:
        return None
    width, height = controls[0].pictures[0].size
    return height, width


def hints_of(
    controls: Sequence[Control],
    bundle: Bundle,
    context: RunContext,
    levels: Timetable,
    prompts: int,
    per_prompt: int,
) -> tuple[Hint, ...]:
    """The controls as the network is told them.

    Args:
        controls: of the call.
        bundle: the model.
        context: the run.
        levels: that it visits.
        prompts: number of its prompts.
        per_prompt: number of pictures of each; they follow one another.

    Raises:
        UserError: a network is of another model, or a picture of another shape than the run; or
            there are as many as neither prompts nor pictures; or no step lies in a stretch.
    """
    hints: list[Hint] = []
    count = prompts * per_prompt
    for control in controls:
        network = control.loaded.on(bundle.device, bundle.network.dtype)
        if isinstance(network, ControlNetwork):
            check_control(network, bundle.network, bundle.factor)
        given = len(control.pictures)
        if given not in (1, prompts, count):
            raise UserError(f"control: {given} pictures were given for {prompts} prompts.")
        pixels = torch.cat([_pixels(one, control.kind, context) for one in control.pictures])
        padded = context.pad(pixels)
        maps = network.embed(padded)
        if isinstance(network, AdapterNetwork):
            high, wide = padded.shape[-2] // bundle.factor, padded.shape[-1] // bundle.factor
            check_maps(network, maps, bundle.network, (high, wide))
        embedded = tuple(one.repeat_interleave(count // given, dim=0) for one in maps)
        scale = torch.full((count,), float(control.scale), device=bundle.device)
        window = _window(control, first_visits(levels))
        guess = control.guess or (isinstance(network, ControlNetwork) and network.pools)
        hints.append(Hint(network, embedded, scale, window, guess))
    return tuple(hints)


def unguided(hints: Sequence[Hint]) -> tuple[Hint, ...]:
    """The same for the negative branch, which guess mode does not tell."""
    return tuple(
        replace(hint, scale=torch.zeros_like(hint.scale)) if hint.guess else hint for hint in hints
    )


def _pixels(picture: Image.Image, kind: str, context: RunContext) -> Tensor:
    """[1, 3, height, width] in [0, 1], resized as diffusers does, and what is made of it.

    Raises:
        UserError: the picture has another shape.
    """
    wide, high = picture.width * context.height, picture.height * context.width
    if abs(wide - high) > max(picture.size):  # by more than a pixel
        raise UserError(
            f"control: a picture of {picture.width} x {picture.height} does not become "
            f"{context.width} x {context.height} without being stretched: crop it."
        )
    size = context.width, context.height
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return (to_tensor(control_picture(picture, kind))[None] + 1) / 2


def _window(control: Control, levels: Timetable) -> tuple[float, float]:
    """The times low < t <= high at which a control is told: those of whole steps in its stretch.

    Raises:
        UserError: there are none.
    """
    steps = len(levels) - 1
    told = [
        step
        for step in range(steps)
        if step / steps >= control.start and (step + 1) / steps <= control.end
    ]
    if not told:
        raise UserError(
            f"control: none of the run's {steps} steps lies between {control.start} and "
            f"{control.end}: take more steps, or a longer stretch."
        )
    low = -math.inf if told[-1] == steps - 1 else levels[told[-1] + 1].t
    return low, math.inf if told[0] == 0 else levels[told[0]].t

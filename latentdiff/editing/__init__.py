"""Editing: constraints on a run, as small values in a list. No edit knows a solver."""

from latentdiff.editing.differential import Differential
from latentdiff.editing.enlarge import Enlarge
from latentdiff.editing.handing_over import DenoisingEnd, DenoisingStart
from latentdiff.editing.hires import Hires
from latentdiff.editing.ilvr import ILVR
from latentdiff.editing.image_conditioning import Inpaint, Instruct
from latentdiff.editing.masks import box_mask
from latentdiff.editing.region import Region, extended
from latentdiff.editing.repaint import Blend, RePaint
from latentdiff.editing.run_context import (
    Binds,
    Finish,
    HoldsPicture,
    RunContext,
    bind,
    padded_size,
    picture_size,
)
from latentdiff.editing.sdedit import SDEdit
from latentdiff.editing.tiled_diffusion import TiledDiffusion

__all__ = [
    "ILVR",
    "Binds",
    "Blend",
    "DenoisingEnd",
    "DenoisingStart",
    "Differential",
    "Enlarge",
    "Finish",
    "Hires",
    "HoldsPicture",
    "Inpaint",
    "Instruct",
    "RePaint",
    "Region",
    "RunContext",
    "SDEdit",
    "TiledDiffusion",
    "bind",
    "box_mask",
    "extended",
    "padded_size",
    "picture_size",
]

"""A latent diffusion toolkit in which everything composes.

from latentdiff import LatentDiffusionPipeline

pipe = LatentDiffusionPipeline.from_pretrained()
image = pipe("a red heart", seed=0).images[0]
"""

from importlib import import_module
from typing import TYPE_CHECKING

from latentdiff.errors import UserError
from latentdiff.version import __version__

if TYPE_CHECKING:
    from latentdiff.bundle import Bundle
    from latentdiff.editing import (
        ILVR,
        Blend,
        DenoisingEnd,
        DenoisingStart,
        Differential,
        Enlarge,
        Hires,
        Inpaint,
        Instruct,
        RePaint,
        SDEdit,
        TiledDiffusion,
    )
    from latentdiff.formats.autoencoder_files import load_autoencoder
    from latentdiff.guidance import (
        PAG,
        SEG,
        Autoguidance,
        Classifier,
        ClassifierGuide,
        Clip,
        ClipGuide,
        DynamicThresholding,
    )
    from latentdiff.pipeline import (
        Control,
        ImagePrompt,
        LatentDiffusionPipeline,
        PipelineOutput,
        Request,
        Run,
    )

__all__ = [
    "ILVR",
    "PAG",
    "SEG",
    "Autoguidance",
    "Blend",
    "Bundle",
    "Classifier",
    "ClassifierGuide",
    "Clip",
    "ClipGuide",
    "Control",
    "DenoisingEnd",
    "DenoisingStart",
    "Differential",
    "DynamicThresholding",
    "Enlarge",
    "Hires",
    "ImagePrompt",
    "Inpaint",
    "Instruct",
    "LatentDiffusionPipeline",
    "PipelineOutput",
    "RePaint",
    "Request",
    "Run",
    "SDEdit",
    "TiledDiffusion",
    "UserError",
    "__version__",
    "load_autoencoder",
]

# Imported when first asked for: `latentdiff --help` shall not wait for torch.
_ROOMS = {
    "latentdiff.bundle": ("Bundle",),
    "latentdiff.editing": (
        "SDEdit",
        "RePaint",
        "Blend",
        "ILVR",
        "Inpaint",
        "Instruct",
        "DenoisingEnd",
        "DenoisingStart",
        "Differential",
        "Enlarge",
        "Hires",
        "TiledDiffusion",
    ),
    "latentdiff.formats.autoencoder_files": ("load_autoencoder",),
    "latentdiff.guidance": (
        "PAG",
        "SEG",
        "Autoguidance",
        "Classifier",
        "ClassifierGuide",
        "Clip",
        "ClipGuide",
        "DynamicThresholding",
    ),
    "latentdiff.pipeline": (
        "Control",
        "ImagePrompt",
        "LatentDiffusionPipeline",
        "PipelineOutput",
        "Request",
        "Run",
    ),
}
_ON_DEMAND = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _ON_DEMAND:
        return getattr(import_module(_ON_DEMAND[name]), name)
    raise AttributeError(f"module 'latentdiff' has no attribute {name!r}")

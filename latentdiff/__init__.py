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
    from latentdiff.editing import ILVR, Blend, Inpaint, Instruct, RePaint, SDEdit
    from latentdiff.guidance.guides import PAG, SEG, Classifier, ClassifierGuide, Clip, ClipGuide
    from latentdiff.pipeline import LatentDiffusionPipeline, PipelineOutput

__all__ = [
    "ILVR",
    "PAG",
    "SEG",
    "Blend",
    "Classifier",
    "ClassifierGuide",
    "Clip",
    "ClipGuide",
    "Inpaint",
    "Instruct",
    "LatentDiffusionPipeline",
    "PipelineOutput",
    "RePaint",
    "SDEdit",
    "UserError",
    "__version__",
]

# Imported when first asked for: `latentdiff --help` shall not wait for torch.
_ON_DEMAND = {
    **dict.fromkeys(
        ("SDEdit", "RePaint", "Blend", "ILVR", "Inpaint", "Instruct"), "latentdiff.editing"
    ),
    **dict.fromkeys(
        ("PAG", "SEG", "Classifier", "ClassifierGuide", "Clip", "ClipGuide"),
        "latentdiff.guidance.guides",
    ),
    "LatentDiffusionPipeline": "latentdiff.pipeline",
    "PipelineOutput": "latentdiff.pipeline",
}


def __getattr__(name: str) -> object:
    if name in _ON_DEMAND:
        return getattr(import_module(_ON_DEMAND[name]), name)
    raise AttributeError(f"module 'latentdiff' has no attribute {name!r}")

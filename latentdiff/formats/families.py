"""The families of models: each says how its files become the three nouns, and back.

A family is one module and a line in `_FAMILIES`. Nothing else knows which there are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn

from latentdiff.formats.scheduler_config import Described
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.conditioner import Conditioner
from latentdiff.models.network import Network
from latentdiff.registry import check_name

if TYPE_CHECKING:
    from latentdiff.formats.weights import WeightFiles

Config = dict[str, object]

# The last one takes what no other claims, and says why it cannot.
_FAMILIES = {
    "stable-diffusion-xl": "latentdiff.formats.stable_diffusion_xl",
    "pixart": "latentdiff.formats.pixart",
    "stable-diffusion": "latentdiff.formats.stable_diffusion",
}
DEFAULT_FAMILY = "stable-diffusion"


@dataclass(frozen=True, eq=False)
class Nouns:
    """The three nouns of a model."""

    autoencoder: Autoencoder
    conditioner: Conditioner
    network: Network


@dataclass(frozen=True, slots=True)
class Choices:
    """Choices that a user makes of a model's files, beside where they are.

    Attributes:
        vae: a folder or a .safetensors file with an autoencoder in place of the model's own.
        variant: the weights to take where a folder has several, as "bf16" of
            `diffusion_pytorch_model.bf16.safetensors`; parts without it keep theirs.
    """

    vae: Path | None = None
    variant: str | None = None


@dataclass(frozen=True, eq=False)
class Weights:
    """A module without memory yet, and the files that fill it.

    Attributes:
        module: of a noun.
        files: opened.
        steady: True where activations overflow float16, so that it is float32 there.
    """

    module: nn.Module
    files: "WeightFiles"
    steady: bool


@dataclass(frozen=True, eq=False)
class Opened:
    """A model whose files are checked and not yet read.

    Attributes:
        nouns: around modules without memory.
        weights: the weights of each module.
        described: what the config of its scheduler says.
    """

    nouns: Nouns
    weights: list[Weights]
    described: Described


class Family(Protocol):
    """A module of `latentdiff.formats` that reads and writes one family of models."""

    def claims_folder(self, index: Mapping[str, object]) -> bool:
        """True for the `model_index.json` of a model of this family."""
        ...

    def claims_file(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """True for the tensors of a single file of this family."""
        ...

    def open_folder(self, folder: Path, choices: Choices) -> Opened:
        """Open a folder in the diffusers layout.

        Raises:
            UserError: anything is missing, damaged, hostile or unfit.
        """
        ...

    def open_file(self, file: Path, choices: Choices) -> Opened:
        """Open a single file as ComfyUI and A1111 have them.

        Raises:
            UserError: likewise.
        """
        ...

    def write_folder(
        self, stage: Path, nouns: Nouns, schedule: Config, dtype: torch.dtype | None
    ) -> None:
        """Write all of a model folder but the scheduler's config into an empty folder.

        Raises:
            UserError: a part cannot be written.
        """
        ...

    def write_file(
        self, path: Path, nouns: Nouns, schedule: Config, dtype: torch.dtype | None
    ) -> None:
        """Write a single file.

        Raises:
            UserError: it cannot be written, or has no place for a part.
        """
        ...


def family(name: str) -> Family:
    """The family of this name.

    Raises:
        UserError: no family has this name.
    """
    check_name("model family", name, _FAMILIES)
    return cast(Family, import_module(_FAMILIES[name]))


def family_of_folder(index: Mapping[str, object]) -> str:
    """The name of the family of a `model_index.json`."""
    return next((n for n in _FAMILIES if family(n).claims_folder(index)), DEFAULT_FAMILY)


def family_of_file(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The name of the family of a single file with these tensors."""
    return next((n for n in _FAMILIES if family(n).claims_file(shapes)), DEFAULT_FAMILY)

"""A classifier of noised latents as a model folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError
from latentdiff.formats.diffusers_save import write_config, writing_model
from latentdiff.formats.weights import (
    WeightFiles,
    build,
    check_numbers,
    fill,
    read_json,
    save_weights,
    weight_files,
)
from latentdiff.models.classifier import LatentClassifier
from latentdiff.registry import check_name

_KIND = "LatentClassifier"


@dataclass(frozen=True, eq=False)
class Classifier:
    """A trained `LatentClassifier`. Threads may share it.

    Attributes:
        network: frozen, in evaluation mode.
    """

    network: LatentClassifier

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read a folder that `save` wrote.

        Raises:
            UserError: anything is missing, damaged, or no such classifier.
        """
        folder = Path(folder)
        path = folder / "config.json"
        config = read_json(path)
        check_numbers(config, str(path))
        labels, channels, width = (config.get(k) for k in ("labels", "latent_channels", "width"))
        if config.get("_class_name") != _KIND or not isinstance(labels, list):
            raise UserError(f"{path}: it describes no {_KIND}.")
        if not isinstance(channels, int) or not isinstance(width, int) or min(channels, width) < 1:
            raise UserError(f"{path}: its latent_channels and width must be whole numbers.")
        names = [str(label) for label in labels]
        files = WeightFiles(weight_files(folder, "model"))
        network = build(
            lambda: LatentClassifier(channels, names, width), str(path), files, layers=1
        )
        return cls(fill(network, files, torch.float32, torch.device(device)))

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return self.network.labels

    def places(self, names: Sequence[str]) -> Tensor:
        """Places of labels, int64 [N].

        Raises:
            UserError: there is no such label.
        """
        for name in names:
            check_name("label", name, self.labels)
        return torch.tensor([self.labels.index(name) for name in names])

    def log_probability(self, x: Tensor, level: NoiseLevel, places: Tensor) -> Tensor:
        """ln p(label | x_t) [B] of x_t [B, C, h, w], with gradients.

        Raises:
            UserError: it was made for latents of another number of channels.
        """
        if x.shape[1] != self.network.latent_channels:
            raise UserError(
                f"the classifier is for latents of {self.network.latent_channels} channels, but "
                f"the model's have {x.shape[1]}; train one for this model."
            )
        power = (level.alpha**2 + level.sigma**2) ** 0.5
        log_snr = torch.full((len(x),), level.log_snr, device=x.device)
        logits = self.network(x.float() / power, log_snr)
        return logits.log_softmax(1).gather(1, places.to(x.device)[:, None])[:, 0]

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the folder that `load` reads.

        The folder of a network that is there already is replaced.

        Raises:
            UserError: it cannot be written, or something else is there.
        """
        folder, network = Path(folder), self.network
        config: dict[str, object] = {
            "_class_name": _KIND,
            "latent_channels": network.latent_channels,
            "width": network.width,
            "labels": network.labels,
        }
        with writing_model(folder, "config.json") as stage:
            write_config(config, stage / "config.json")
            save_weights(dict(network.state_dict()), stage / "model.safetensors", dtype)
        return folder

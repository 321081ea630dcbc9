"""The model that a command uses, with its LoRAs."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from latentdiff.errors import UserError
from latentdiff.reading import fingerprint

if TYPE_CHECKING:
    from latentdiff.bundle import Bundle
    from latentdiff.models.autoencoder import Autoencoder
    from latentdiff.pipeline import LatentDiffusionPipeline

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
EngineName = Literal["auto", "eager", "packed", "compiled", "openvino"]
AttentionName = Literal["auto", "eager", "sdpa", "xformers"]


@dataclass(frozen=True)
class ModelOptions:
    """Options that choose a model and what goes into it; see `cli.options`."""

    model: str | None
    vae: Path | None = None
    prediction: str | None = None
    variant: str | None = None
    loras: Sequence[str] | None = None
    embeddings: Sequence[Path] | None = None
    fast: bool = False

    def check(self) -> None:
        """Check the names of what goes into the model before it is loaded.

        Raises:
            UserError: a file is not there, or an unknown prediction.
        """
        from latentdiff.diffusion.prediction import Prediction
        from latentdiff.formats.location import find_file
        from latentdiff.registry import check_name

        if self.prediction is not None:
            check_name("prediction", self.prediction, get_args(Prediction))
        if self.vae is not None:
            check_autoencoder(self.vae)
        for text in self.loras or ():
            find_file(parse_lora(text)[0], "LoRA file")
        for path in self.embeddings or ():
            find_file(path, "file of learned words")

    def load(
        self,
        device: str,
        dtype: DtypeName,
        engine: EngineName = "auto",
        attention: AttentionName = "auto",
    ) -> "LatentDiffusionPipeline":
        """The pipeline, with each LoRA of `--lora` and the words of `--embedding` in it."""
        wanted = [parse_lora(text) for text in self.loras or ()]
        from latentdiff.lora import default_name, lora_names
        from latentdiff.pipeline import LatentDiffusionPipeline

        pipe = LatentDiffusionPipeline.from_pretrained(
            self.model,
            vae=self.vae,
            prediction=self.prediction,  # pyright: ignore[reportArgumentType]  (checked there)
            variant=self.variant,
            dtype=dtype,
            device=device,
            engine="eager" if wanted else engine,  # compiled code is of weights with LoRAs in them
            attention=attention,
            fast=self.fast,
        )
        for path in self.embeddings or ():
            pipe.load_textual_inversion(path)
        with warnings.catch_warnings():
            if self.embeddings:
                warnings.filterwarnings("ignore", ".*it also holds the learned words")
            for path, scale in wanted:
                name = own = default_name(path)
                while name in lora_names(pipe.bundle):  # another folder's file of that name
                    name = f"{own[:56]}-{len(lora_names(pipe.bundle))}"
                pipe.load_lora(path, scale, name)
        if wanted:
            pipe.bundle = pipe.bundle.inside(engine)
        return pipe

    @property
    def files(self) -> list[Path]:
        """Files of this machine that go into the model."""
        from latentdiff.formats.location import is_hub_id

        vae = [] if self.vae is None or is_hub_id(self.vae) else [self.vae]
        loras = [parse_lora(text)[0] for text in self.loras or ()]
        return [*vae, *loras, *(self.embeddings or ())]

    def about(self) -> dict[str, object]:
        """Record what is beside the model for the text chunk of a picture."""
        wanted = [parse_lora(text) for text in self.loras or ()]
        record = {
            "vae": self.vae and self.vae.name,
            "prediction": self.prediction,
            "variant": self.variant,
            "loras": [[path.name, scale] for path, scale in wanted],
            "embeddings": [path.name for path in self.embeddings or ()],
            "fast": self.fast,
        }
        return {name: value for name, value in record.items() if value}


def check_autoencoder(where: str | Path) -> None:
    """Check that there is an autoencoder to load, or that the hub may have it.

    Raises:
        UserError: there is none.
    """
    from latentdiff.formats.location import find_file, is_hub_id

    if not is_hub_id(where):
        find_file(where, "autoencoder")


def preview_autoencoder(where: str | Path, bundle: "Bundle") -> "Autoencoder":
    """The autoencoder of `--preview-vae`, on the model's device.

    Raises:
        UserError: it is damaged, or of other latents.
    """
    import torch

    from latentdiff.formats.autoencoder_files import load_autoencoder
    from latentdiff.models.preview import check_same_latents

    by = load_autoencoder(where, latent_scale(bundle))
    check_same_latents(by, bundle.autoencoder)
    torch.nn.Module.to(by.module, bundle.device)  # diffusers' own has no types
    return by


def latent_scale(bundle: "Bundle") -> float:
    """The number by which latents of a model are those of its autoencoder, or where that does not
    tell, as a tiny one does not, those of the autoencoder that its family was published with."""
    from latentdiff.formats.pixart import published_scale
    from latentdiff.formats.single_file_configs import XL_SCALE

    if (own := bundle.autoencoder.scaling_factor) is not None:
        return own
    if bundle.family == "pixart":
        return published_scale(bundle.conditioner.window)
    return XL_SCALE if bundle.family == "stable-diffusion-xl" else 0.18215


def hashed(files: Sequence[Path]) -> dict[str, object]:
    """Record the fingerprints of files beside their names, for the text chunk of a picture."""
    from latentdiff.formats.location import expanded

    told = [[file.name, _fingerprint(expanded(file))] for file in files]
    return {"hashes": told} if told else {}


def _fingerprint(path: Path) -> str:
    """See `latentdiff.reading.fingerprint`; of a file that is there for a whole run, once."""
    try:
        inside = [path, *path.rglob("*")] if path.is_dir() else [path]
        found = [(each, each.stat()) for each in inside]
        return _once(path, tuple((each, at.st_mtime_ns, at.st_size) for each, at in found))
    except OSError:
        return "gone"


@cache
def _once(path: Path, _state: tuple[tuple[Path, int, int], ...]) -> str:
    return fingerprint(path)


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE; a file whose own name has a colon in it is found as well.

    Raises:
        UserError: what follows the last colon is no number, and the whole is no file.
    """
    path, colon, scale = text.rpartition(":")
    try:
        if not colon or Path(text).exists():
            return Path(text), 1.0
    except OSError as error:  # a name too long
        raise UserError(f"--lora {text!s:.100}: {error.strerror}.") from error
    try:
        number = float(scale)
    except ValueError as error:
        # C:\cats.safetensors has a colon, and no scale.
        if "/" in scale or "\\" in scale or scale.endswith(".safetensors"):
            return Path(text), 1.0
        raise UserError(
            f"--lora {text!s:.200}: '{scale!s:.40}' is no scale; FILE:0.8 is meant."
        ) from error
    if not path or not math.isfinite(number):
        raise UserError(f"--lora {text!s:.200}: a file and a finite scale are needed: FILE:0.8.")
    return Path(path), number


def with_named(loras: Sequence[str], folder: Path | None, named: Mapping[str, float]) -> list[str]:
    """The options --lora, with the LoRAs that prompts name at the scales that they say.

    Args:
        loras: FILE or FILE:SCALE each.
        folder: whose .safetensors files, in folders in it too, are looked among as well.
        named: names of files without their end, and scales.

    Raises:
        UserError: there is no such file, or there are two.
    """
    files: dict[Path, float] = dict(map(parse_lora, loras))
    from latentdiff.formats.location import find_file

    if folder is not None and not find_file(folder, "folder of LoRAs").is_dir():
        raise UserError(f"--lora-dir {folder}: it is a file; name the folder of LoRAs.")
    beside = [] if folder is None or not named else sorted(folder.rglob("*.safetensors"))
    for name, scale in named.items():
        found = [file for file in files if name in (file.name, file.stem)]
        found = found or [file for file in beside if file.stem == name]
        if len(found) != 1:
            count = f"there are {len(found)} such files" if found else "there is no such file"
            raise UserError(
                f"<lora:{name:.80}:{scale:g}>: {count} among those of --lora and in --lora-dir."
            )
        files[found[0]] = scale
    return [f"{file}:{scale}" for file, scale in files.items()]

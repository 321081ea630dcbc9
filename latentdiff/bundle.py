"""One model: autoencoder, conditioner and network, and how the network was trained."""

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from torch import nn

from latentdiff import solvers
from latentdiff.diffusion import timetable as timetables
from latentdiff.diffusion.prediction import Prediction
from latentdiff.diffusion.process import Process
from latentdiff.diffusion.solver import Solver
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.formats import scheduler_config
from latentdiff.formats.families import (
    DEFAULT_FAMILY,
    Choices,
    Nouns,
    Opened,
    family,
    family_of_file,
    family_of_folder,
)
from latentdiff.formats.location import find, find_autoencoder
from latentdiff.formats.model_captions import read_captions, write_captions
from latentdiff.formats.scheduler_config import DEFAULT_SOLVER, Steps
from latentdiff.formats.weights import WeightFiles, blaming, fill, read_json
from latentdiff.models.attention import Attention, set_attention
from latentdiff.models.autoencoder import Autoencoder, DiffusersAutoencoder
from latentdiff.models.conditioner import Conditioner
from latentdiff.models.engines import Engine, engine_of, with_engine
from latentdiff.models.engines.around import AroundNetwork
from latentdiff.models.network import Kind, Network
from latentdiff.models.tiling import Tiling
from latentdiff.registry import check_name

__all__ = ["Bundle", "Precision", "Steps"]

# Parameters of a network from which bfloat16 is faster on every CPU with instructions for it: with
# AVX-512's, layers of Stable Diffusion's size take 0.2 to 0.6 of the time, and one picture of the
# bundled network of 17 million as long as in float32.
_LARGE = 100_000_000

Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, eq=False, repr=False)
class Bundle:
    """A model: three nouns that fit each other, and how its network was trained.

    Attributes:
        autoencoder: pictures to latents and back.
        conditioner: prompts to the network's condition.
        network: (x_t, t, condition) -> `prediction`.
        process: the forward process the network was trained on.
        prediction: the prediction type of the network.
        steps: the timetable it was meant to be sampled with.
        solver: the name of the solver it was meant to be sampled with.
        name: for people.
        family: how its files are read and written: see `latentdiff.formats.families`.
        captions: some of those that it was trained on, if its folder holds any.
        num_inference_steps, guidance_scale: what a call takes that says none; of None the scale is
            that of the method of guidance.

    Raises:
        UserError: the nouns do not fit each other, or no solver has this name.
    """

    autoencoder: Autoencoder
    conditioner: Conditioner
    network: Network
    process: Process
    prediction: Prediction
    steps: Steps = field(default_factory=Steps)
    solver: str = DEFAULT_SOLVER
    name: str = "model"
    family: str = DEFAULT_FAMILY
    captions: tuple[str, ...] = ()
    num_inference_steps: int = 20
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        check_name("solver", self.solver, solvers.names())
        if self.network.width != self.conditioner.width:
            raise UserError(
                f"{self.network.part}: it attends to text states of width {self.network.width}, "
                f"but the text encoder's have {self.conditioner.width}."
            )
        if self.network.channels != self.autoencoder.channels:
            raise UserError(
                f"{self.network.part}: it is of latents of {self.network.channels} channels, but "
                f"the vae's have {self.autoencoder.channels}."
            )
        if self.kind == "instruct-pix2pix" and self.autoencoder.scaling_factor is None:
            raise UserError(
                "vae: it is a tiny one, or has a shift_factor, latents_mean or latents_std, and so "
                "nothing says which numbers its InstructPix2Pix U-Net was shown; such a pair does "
                "not work here."
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.about})"

    @property
    def engine(self) -> Engine:
        """The engine by which it is computed: see `latentdiff.models.engines.engine_of`."""
        return engine_of(self.network, self.autoencoder)

    @property
    def about(self) -> str:
        """One line for people: name, kind, size, parameters, prediction and solver."""
        height, width = self.size
        count = sum(p.numel() for module in self.modules.values() for p in module.parameters())
        precision = str(self.network.dtype).removeprefix("torch.")
        return (
            f"{self.name}: {self.kind}, {width} x {height} pixels, {count / 1e6:,.1f} M parameters "
            f"in {precision} on {self.device}, predicts {self.prediction}, {self.solver}"
        )

    @classmethod
    def load(
        cls,
        where: str | Path | None = None,
        *,
        vae: str | Path | None = None,
        prediction: Prediction | None = None,
        variant: str | None = None,
        dtype: Precision | torch.dtype = "auto",
        device: str | torch.device = "auto",
        attention: Attention = "auto",
        engine: Engine = "eager",
        tiling: Tiling = "auto",
    ) -> Self:
        """Read a model, after checking all of it: files, configs, names, shapes, finite values.

        Weights that keep their precision are mapped from their file: replace a file that is in use,
        never overwrite it.

        Args:
            where: a folder in the diffusers layout, a .safetensors file of Stable Diffusion 1.x,
                2.x or XL as ComfyUI and A1111 have them, a hub id as "owner/name", or None for the
                bundled model.
            vae: a folder, a .safetensors file or a hub id with an autoencoder in place of the
                model's own, which many single files lack: see
                `formats.autoencoder_files.open_autoencoder`.
            prediction: what the network predicts, where its files do not say so or are wrong.
            variant: the weights to take where a folder has several, as "bf16".
            dtype: precision of the networks. "auto" is bfloat16 (or float16) on CUDA, bfloat16 for
                a network of 100 million parameters or more on a CPU that computes in it, else
                float32.
            device: "auto" is CUDA where there is one.
            attention: see `latentdiff.models.attention.set_attention`.
            engine: how the U-Net and the autoencoder are computed: see `latentdiff.models.engines`.
            tiling: whether pictures go through the autoencoder in tiles, to take less memory: "on",
                "off", or "auto", large ones; see `latentdiff.models.tiling`.

        Raises:
            UserError: anything is missing, damaged, hostile or unfit; the message says what.
        """
        check_name("attention backend", attention, get_args(Attention))
        check_name("engine", engine, get_args(Engine))
        check_name("tiling", tiling, get_args(Tiling))
        if prediction is not None:
            check_name("prediction", prediction, get_args(Prediction))
        place = _device(device)
        _check_dtype(dtype)
        path = find(where)
        other = None if vae is None else find_autoencoder(vae)
        with _collector_resting():
            name, opened = _open(path, Choices(other, variant))
        with blaming(path):
            nouns = opened.nouns
            bundle = cls(
                nouns.autoencoder,
                nouns.conditioner,
                nouns.network,
                *opened.described,
                name=str(where or path.name),
                family=name,
                captions=read_captions(path) if path.is_dir() else (),
            )
        if prediction is not None:
            bundle = replace(bundle, prediction=prediction)
        precision = _dtype(dtype, place, bundle.network.module)
        for part in opened.weights:
            fill(part.module, part.files, _steady(precision) if part.steady else precision, place)
        set_attention(bundle.network.module, attention)
        set_attention(bundle.autoencoder.module, attention)
        if isinstance(bundle.autoencoder, DiffusersAutoencoder):
            bundle = replace(bundle, autoencoder=replace(bundle.autoencoder, tiling=tiling))
        return bundle.inside(engine)

    def inside(self, engine: Engine) -> Self:
        """The model, loaded with the engine "eager", in another: see `latentdiff.models.engines`.

        Compiled code of weights with a LoRA in them is looked for here, so put the LoRA in before.

        Raises:
            UserError: unknown name, this engine cannot compute the network here, or it is in one.
        """
        if isinstance(self.network, AroundNetwork):
            raise UserError(f'{self.name} is in an engine already: load it with engine="eager".')
        network, autoencoder = with_engine(self.network, self.autoencoder, engine)
        return replace(self, network=network, autoencoder=autoencoder)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Every network by the name of its folder."""
        return {
            self.network.part: self.network.module,
            "vae": self.autoencoder.module,
            **self.conditioner.modules,
        }

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.network.device

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return self.autoencoder.factor

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.autoencoder.channels

    @property
    def kind(self) -> Kind:
        """The input of the network: x_t alone, or with the channels of `Inpaint` or `Instruct`."""
        return self.network.kind

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures it was trained on."""
        height, width = self.network.native_size
        return height * self.factor, width * self.factor

    def settings(
        self, steps: int | None, guidance: object, scale: float | None
    ) -> tuple[int, float | None]:
        """Steps and guidance scale of a call; those that are None are the model's own. The scale
        is so for the guidance "cfg" alone: another method, which was asked for, has its own."""
        own = self.guidance_scale if guidance == "cfg" else None
        return (
            self.num_inference_steps if steps is None else steps,
            own if scale is None else scale,
        )

    def timetable(self, name: str | None, steps: int) -> Timetable:
        """The levels of a run to clean data: the named timetable, or with None the model's own.

        The model's own solver may end elsewhere: see `plan`.

        Raises:
            UserError: unknown name, or a number of steps that it does not have.
        """
        if name is None or name == self.steps.spacing:
            return self.steps.to_data().timetable(self.process, steps)
        return timetables.create(name, self.process, steps)

    def plan(self, steps: int) -> tuple[Solver, Timetable]:
        """The model's own solver and levels for a run of so many steps, set as its makers meant it.

        Raises:
            UserError: a number of steps that the timetable does not have.
        """
        return self.steps.plan(self.solver, self.process, steps)

    def save(self, where: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write the diffusers layout, which diffusers' own Stable Diffusion pipelines open, too.

        Everything is written beside the folder and renamed once it is on the disk. A model that is
        there already is replaced: a folder with its `model_index.json`, or a file that `load` takes
        for a model by its header. Anything else is left alone. A latent mean that the config of
        the autoencoder holds is folded into its convolutions, for diffusers does not apply it.

        Args:
            where: the folder to be; or a .safetensors file, for a single file as ComfyUI and A1111
                have them, with configs and tokenizer in its header.
            dtype: dtype of the weights in the files; None keeps theirs.

        Raises:
            UserError: it cannot be written, something else is there, a LoRA is attached, or the
                model has parts that a single file cannot hold.
        """
        from latentdiff.formats.diffusers_save import write_config, writing_model

        marks = ("peft_config", "lora_sums")  # see `latentdiff.lora`
        if any(getattr(n, mark, None) for n in self.modules.values() for mark in marks):
            raise UserError("the model has a LoRA in it: remove it, or fuse it, and then save.")
        schedule = scheduler_config.write(
            self.process,
            self.prediction,
            self.steps,
            self.solver,
            learned_variance=self.network.learns_variance,
        )
        nouns = Nouns(self.autoencoder, self.conditioner, self.network)
        path = Path(where)
        if path.suffix == ".safetensors" and not path.is_dir():
            family(self.family).write_file(path, nouns, schedule, dtype)
            return path
        with writing_model(path, "model_index.json") as stage:
            family(self.family).write_folder(stage, nouns, schedule, dtype)
            write_config(schedule, stage / "scheduler" / "scheduler_config.json")
            write_captions(self.captions, stage)
        return path


def open_nouns(where: str | Path | None) -> tuple[str, Nouns]:
    """The name of a model's family and its nouns, around modules whose weights are not read.

    Raises:
        UserError: there is no such model, or anything is missing, hostile or unfit.
    """
    with _collector_resting():
        name, opened = _open(find(where), Choices())
    return name, opened.nouns


def _open(path: Path, choices: Choices) -> tuple[str, Opened]:
    """The family's name and the model, opened; a file or a folder."""
    if path.is_file():
        with blaming(path):
            name = family_of_file(WeightFiles([path]).shapes)
        return name, family(name).open_file(path, choices)
    name = family_of_folder(read_json(path / "model_index.json"))
    return name, family(name).open_folder(path, choices)


@contextlib.contextmanager
def _collector_resting() -> Iterator[None]:
    """Importing diffusers makes millions of objects that stay; to look for garbage among them again
    and again takes a quarter of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device '{device}' is not available here; try 'auto' or 'cpu'.") from error
    if place.type == "meta":
        raise UserError("device 'meta' holds no numbers; try 'auto' or 'cpu'.")
    return place


def _check_dtype(dtype: Precision | torch.dtype) -> str:
    """The name of a precision.

    Raises:
        UserError: there is no such precision.
    """
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    check_name("dtype", name, get_args(Precision))
    return name


def _dtype(dtype: Precision | torch.dtype, device: torch.device, network: nn.Module) -> torch.dtype:
    name = _check_dtype(dtype)
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    halves = device.type == "cpu" and is_large_network(network) and computes_halves()
    return torch.bfloat16 if halves else torch.float32


def is_large_network(network: nn.Module) -> bool:
    """True of a network of 100 million parameters or more."""
    return sum(parameter.numel() for parameter in network.parameters()) >= _LARGE


def computes_halves() -> bool:
    """True of a CPU with instructions for bfloat16: AVX-512's or AMX's."""
    asked = (f"_is_{name}_supported" for name in ("avx512_bf16", "amx_tile"))
    return any(hasattr(torch.cpu, name) and getattr(torch.cpu, name)() for name in asked)


def _steady(dtype: torch.dtype) -> torch.dtype:
    """Replace float16 by float32 for autoencoders and T5, whose activations overflow it."""
    return torch.float32 if dtype == torch.float16 else dtype

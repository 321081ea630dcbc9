"""The parts of one model, checked against each other, and the folder they live in."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from torch import Tensor

from latentdiff import solvers
from latentdiff.diffusion import timetable as timetables
from latentdiff.diffusion.denoiser import Condition
from latentdiff.diffusion.prediction import Prediction
from latentdiff.diffusion.process import Process
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.formats import scheduler_config as scheduler
from latentdiff.formats.check import (
    Kind,
    check_input,
    check_parts,
    kind_of,
    latent_affine,
    latent_channels,
)
from latentdiff.formats.location import find
from latentdiff.formats.scheduler_config import DEFAULT_SOLVER, Steps
from latentdiff.formats.weights import blaming, fill
from latentdiff.guidance.perturbed_attention import SPOILT
from latentdiff.models.attention import Attention, set_attention
from latentdiff.models.perturbation import Perturbation, Spoilt, perturbable
from latentdiff.models.text_encoders import TextTower
from latentdiff.registry import check_name
from latentdiff.solvers import Solver

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

Precision = Literal["auto", "float32", "bfloat16", "float16"]

# Pixels decoded at once: the activations of an autoencoder are hundreds of times its pictures.
_DECODED_AT_ONCE = 2**20


@dataclass(frozen=True, eq=False)
class Bundle:
    """A model: an autoencoder, a U-Net in its latents, a text tower, and how they were trained.

    Attributes:
        vae: pictures [B, 3, H, W] in [-1, 1] to latents [B, C, H / factor, W / factor] and back.
        unet: (x_t, t, text states) -> `prediction`.
        text: prompts to states.
        process: the forward process the U-Net was trained on.
        prediction: what it predicts.
        steps: the timetable it was meant to be sampled with.
        solver: the name of the solver it was meant to be sampled with.
        name: for people.

    Raises:
        UserError: the parts do not fit each other, or no solver has this name.
    """

    vae: "AutoencoderKL | VQModel"
    unet: "UNet2DConditionModel"
    text: TextTower
    process: Process
    prediction: Prediction
    steps: Steps = field(default_factory=Steps)
    solver: str = DEFAULT_SOLVER
    name: str = "model"

    def __post_init__(self) -> None:
        check_name("solver", self.solver, solvers.names())
        check_parts(self.vae, self.unet, self.text)

    @classmethod
    def load(
        cls,
        where: str | Path | None = None,
        *,
        dtype: Precision | torch.dtype = "auto",
        device: str | torch.device = "auto",
        attention: Attention = "auto",
    ) -> Self:
        """Read a model, after checking all of it: files, configs, names, shapes, finite values.

        Args:
            where: a folder in the diffusers layout, a .safetensors file of Stable Diffusion 1.x or
                2.x as ComfyUI and A1111 have them, a hub id as "owner/name", or None for the
                bundled model.
            dtype: of the networks. "auto" is bfloat16 (or float16) on CUDA and float32 elsewhere.
            device: "auto" is CUDA where there is one.
            attention: see `latentdiff.models.attention.set_attention`.

        Raises:
            UserError: anything is missing, damaged, hostile or unfit; the message says what.
        """
        check_name("attention backend", attention, get_args(Attention))
        place = _device(device)
        precision = _dtype(dtype, place)
        folder = find(where)
        with _collector_resting():
            from latentdiff.formats import diffusers_folder as parts
            from latentdiff.formats.single_file import open_single

        if folder.is_file():
            (unet, unet_files), (vae, vae_files), (text, text_files), schedule = open_single(folder)
            described = scheduler.read(schedule, f"{folder}: scheduler")
        else:
            parts.check_folder(folder)
            unet, unet_files = parts.unet(folder / "unet")
            vae, vae_files = parts.vae(folder / "vae")
            text, text_files = parts.text(folder / "text_encoder", folder / "tokenizer")
            described = scheduler.read_folder(folder)
        with blaming(folder):
            bundle = cls(vae, unet, text, *described, name=str(where or folder.name))
        fill(unet, unet_files, precision, place)
        fill(vae, vae_files, _steady(precision), place)
        fill(text.model, text_files, _steady(precision), place)
        set_attention(unet, attention)
        set_attention(vae, attention)
        return bundle

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the U-Net computes in."""
        return next(self.unet.parameters()).dtype

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return latent_channels(self.vae)

    @property
    def kind(self) -> Kind:
        """What the U-Net sees: x_t alone, or what the edit `Inpaint` or `Instruct` adds to it."""
        return kind_of(self.vae, self.unet)

    @property
    def learns_variance(self) -> bool:
        """Whether the U-Net gives 2C channels, of which the last C tell the variance of a step."""
        return self.unet.config["out_channels"] == 2 * self.latent_channels

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures it was trained on."""
        side = self.unet.config["sample_size"]
        height, width = (side[0], side[-1]) if isinstance(side, list | tuple) else (side, side)
        return height * self.factor, width * self.factor

    def network(
        self, perturbations: Sequence[Perturbation] = ()
    ) -> Callable[[Tensor, Tensor, Condition], Tensor]:
        """The U-Net as `latentdiff.diffusion.denoiser.conditioned_denoiser` takes it.

        The condition holds "states" [B, L, D]; where the tower has one, "mask" [B, L]; and with
        an inpainting or InstructPix2Pix U-Net "beside" [B, extra, h, w], which it sees behind the
        channels of x. Without it, or with too much, `predict` raises a UserError. The
        output is [B, C, h, w], or [B, 2C, h, w] with a learned variance.

        Args:
            perturbations: of the attention in the rows that `SPOILT` tells.

        Raises:
            UserError: a perturbation names a layer that is not there.
        """
        dtype, kind, channels = self.dtype, self.kind, self.unet.config["in_channels"]
        unet = perturbable(self.unet, perturbations) if perturbations else self.unet

        def predict(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            if "beside" in condition:
                x = torch.cat([x, condition["beside"].to(x)], dim=1)
            check_input(kind, channels, x.shape[1])
            rows = condition.get(SPOILT)
            size = x.shape[-2], x.shape[-1]
            spoilt = None if rows is None else Spoilt(rows.to(x.device), size)
            return unet(
                x.to(dtype),
                t,
                encoder_hidden_states=condition["states"].to(dtype),
                encoder_attention_mask=condition.get("mask"),
                cross_attention_kwargs=None if spoilt is None else {"spoilt": spoilt},
                return_dict=False,
            )[0]

        return predict

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

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, C, H / factor, W / factor], float32.

        The mean of the autoencoder's posterior is taken, so the answer is always the same.
        """
        parameter = next(self.vae.parameters())
        encoded: Any = self.vae.encode(pictures.to(parameter.device, parameter.dtype))
        z: Tensor = encoded.latents if "latents" in encoded else encoded.latent_dist.mode()
        gain, offset = latent_affine(self.vae)
        return (z.float() - offset.to(z.device)) / gain.to(z.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pictures [B, 3, h * factor, w * factor], float32 about [-1, 1].

        Many pictures are decoded a few at a time.
        """
        parameter = next(self.vae.parameters())
        gain, offset = latent_affine(self.vae)
        z = latents * gain.to(latents.device) + offset.to(latents.device)
        z = z.to(parameter.device, parameter.dtype)
        pixels = z.shape[-2] * z.shape[-1] * self.factor**2
        decode: Any = self.vae.decode
        chunks = z.split(max(1, _DECODED_AT_ONCE // pixels))
        return torch.cat([decode(chunk, return_dict=False)[0].float() for chunk in chunks])

    def save(self, where: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write the diffusers layout, which diffusers' own Stable Diffusion pipelines open, too.

        Everything is written beside the folder and renamed once it is on the disk. A model folder
        already there is replaced; anything else is left alone. A latent mean that the config of
        the autoencoder holds is folded into its convolutions, for diffusers does not apply it.

        Args:
            where: the folder to be; or a .safetensors file, for a single file as ComfyUI and A1111
                have them, with configs and tokenizer in its header.
            dtype: of the weights in the files; None keeps what they are.

        Raises:
            UserError: it cannot be written, the folder holds something else, a LoRA is attached, or
                the model has parts that a single file cannot hold.
        """
        from latentdiff.formats.diffusers_save import save_folder
        from latentdiff.formats.single_file import save_single

        if any(getattr(network, "peft_config", None) for network in (self.unet, self.text.model)):
            raise UserError("the model has a LoRA in it: remove it, or fuse it, and then save.")
        config = scheduler.write(
            self.process,
            self.prediction,
            self.steps,
            self.solver,
            learned_variance=self.learns_variance,
        )
        path = Path(where)
        save = save_single if path.suffix == ".safetensors" and not path.is_dir() else save_folder
        return save(path, self.vae, self.unet, self.text, config, dtype)


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


def _dtype(dtype: Precision | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        dtype_name = str(dtype).removeprefix("torch.")
    else:
        dtype_name = dtype
    check_name("dtype", dtype_name, get_args(Precision))
    if dtype_name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return getattr(torch, dtype_name)


def _steady(dtype: torch.dtype) -> torch.dtype:
    """For autoencoders and T5, whose activations overflow float16: float32 there."""
    return torch.float32 if dtype == torch.float16 else dtype

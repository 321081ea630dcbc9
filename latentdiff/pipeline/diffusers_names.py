"""Habits of users of diffusers: their names for what is here, and a line for what is another way.

What has an equal is one (`pipe.unet`, `pipe.save_pretrained`). Whatever else people type is in one
table, `ANSWERS`, and is answered by the name of ours; nothing is taken in silence.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.errors import UserError

StepEnd = Callable[[Any, int, Tensor, dict[str, Any]], Mapping[str, Any] | None]
"""diffusers' callback_on_step_end: (pipeline, index of the step, time [] at which it began,
{"latents": x [B, C, h, w]}) -> the last again, perhaps with another x, or None."""

P = ParamSpec("P")
R = TypeVar("R")

_TABLE: tuple[tuple[str, str], ...] = (
    (
        "unet transformer vae text_encoder tokenizer components config register_modules "
        "from_pipe from_config",
        "parts are replaced in a model: LatentDiffusionPipeline(dataclasses.replace(pipe.bundle, "
        "network=..., autoencoder=..., conditioner=...))",
    ),
    (
        "to cuda cpu half device dtype device_map",
        "device and precision are chosen at loading: from_pretrained(..., device=, dtype=)",
    ),
    ("low_cpu_mem_usage", "leave it out: weights are read part by part anyway"),
    (
        "enable_attention_slicing disable_attention_slicing set_attention_slice "
        "enable_xformers_memory_efficient_attention disable_xformers_memory_efficient_attention",
        "attention saves memory anyway; from_pretrained(..., attention=) names a backend",
    ),
    (
        "enable_vae_slicing disable_vae_slicing enable_vae_tiling disable_vae_tiling",
        "pictures are decoded a few at a time anyway, and large ones in tiles; "
        "from_pretrained(..., tiling='on') takes tiles for all",
    ),
    (
        "enable_model_cpu_offload enable_sequential_cpu_offload maybe_free_model_hooks",
        "parts are not moved about here: load with dtype='bfloat16', or on device='cpu'",
    ),
    (
        "safety_checker requires_safety_checker feature_extractor run_safety_checker",
        "there is no safety filter here: leave it out, and look at the pictures",
    ),
    (
        "fuse_lora unfuse_lora unload_lora_weights set_adapters delete_adapters disable_lora "
        "enable_lora get_active_adapters get_list_adapters cross_attention_kwargs",
        "load_lora, set_loras({name: scale}), remove_lora(name) and fuse_loras() are for LoRAs",
    ),
    ("set_progress_bar_config progress_bar", "pipe(..., progress=False) shows no bar"),
    ("interrupt _interrupt", "run = pipe.prepare(Request(...)) makes a run, run.cancel() ends it"),
    ("image strength", "pictures come in as edits: edits=[SDEdit(image, strength)]"),
    (
        "mask_image masked_image_latents padding_mask_crop",
        "masks come in as edits: edits=[RePaint(image, mask)] or [Inpaint(image, mask)]",
    ),
    (
        "controlnet controlnet_conditioning_scale control_guidance_start control_guidance_end "
        "control_image guess_mode",
        "ControlNets come in as controls=[Control(folder, picture, scale, start, end, guess)]",
    ),
    (
        "load_ip_adapter set_ip_adapter_scale ip_adapter_image unload_ip_adapter",
        "IP-Adapters come in as image_prompts=[ImagePrompt(file, picture, scale)]",
    ),
    (
        "adapter adapter_conditioning_scale adapter_conditioning_factor",
        "T2I-Adapters come in as controls=[Control(folder, picture, scale, end=factor)]",
    ),
    ("image_guidance_scale", "it is an edit's: edits=[Instruct(image, image_guidance_scale)]"),
    ("pag_scale pag_adaptive_scale", "perturbed attention is an edit: edits=['pag:3']"),
    (
        "denoising_end denoising_start",
        "they are edits: edits=[DenoisingEnd(0.8)], then edits=[DenoisingStart(latents, 0.8)]",
    ),
    ("crops_coords_top_left", "crop=(top, left)"),
    (
        "negative_original_size negative_crops_coords_top_left negative_target_size",
        "what is not wanted is told the sizes of what is: original_size=, crop=, target_size=",
    ),
    (
        "pooled_prompt_embeds negative_pooled_prompt_embeds",
        "prompt_embeds=Condition(states=..., pooled=...) and negative_prompt_embeds= have both",
    ),
    ("eta", "it is the solver's: solver=latentdiff.solvers.DDIM(eta=1.0)"),
    (
        "timesteps sigmas num_timesteps",
        "timetable= takes a name, or levels as latentdiff.diffusion.timetable.create makes them",
    ),
    ("_guidance_scale", "guidance_scale= and guidance_interval=(low, high) are of the whole run"),
    (
        "callback callback_steps",
        "callback_on_step_end(pipe, step, timestep, kwargs) or on_move(index, level, x), after "
        "every step",
    ),
    ("encode_prompt", "pipe.bundle.conditioner.encode(texts, pipe.bundle.size).condition"),
    ("vae_scale_factor", "pipe.bundle.factor"),
    ("image_processor", "latentdiff.pictures opens and writes pictures"),
    ("use_safetensors", "leave it out: nothing else is opened"),
    (
        "revision cache_dir local_files_only token force_download",
        "leave it out: HF_TOKEN, HF_HOME and HF_HUB_OFFLINE say how the Hub is asked",
    ),
    (
        "custom_pipeline enable_freeu disable_freeu ip_adapter_image_embeds prompt_2 "
        "negative_prompt_2",
        "this toolkit has nothing of the kind",
    ),
)
ANSWERS: dict[str, str] = {name: told for names, told in _TABLE for name in names.split()}
"""What diffusers calls it: what does it here."""


def answering(call: Callable[P, R]) -> Callable[P, R]:
    """The same function; an argument of diffusers that it does not have is told in a line."""
    known = inspect.signature(call).parameters.keys()

    @wraps(call)
    def answered(*arguments: P.args, **named: P.kwargs) -> R:
        for name in named:
            if name not in known and name in ANSWERS:
                raise UserError(f"{name}: {ANSWERS[name]}.")
        return call(*arguments, **named)

    return answered


def check_step_inputs(callback: StepEnd, names: Sequence[str]) -> None:
    """Check that a callback of diffusers asks for nothing but latents.

    Raises:
        UserError: it does, by `names` or by its own `tensor_inputs`.
    """
    other = {*names, *getattr(callback, "tensor_inputs", ())} - {"latents"}
    if other:
        raise UserError(
            f"callback_on_step_end_tensor_inputs: 'latents' is all that a step shows, not "
            f"{min(other)!r}; a guidance_interval or an edit changes guidance on the way."
        )


def latents_of(returned: Mapping[str, Any] | None, latents: Tensor) -> Tensor:
    """The latents that a callback of diffusers has returned; those given if it returned none.

    Raises:
        UserError: it returned something else.
    """
    if returned is None:
        return latents
    if not isinstance(returned, Mapping) or returned.keys() - {"latents"}:
        told = sorted(returned) if isinstance(returned, Mapping) else type(returned).__name__
        raise UserError(
            f"callback_on_step_end: it returns {{'latents': x}} or None, not {told}; on_move takes "
            "(index, level, x)."
        )
    return returned.get("latents", latents)


class DiffusersNames:
    """What users of diffusers ask a pipeline for, where that is something here.

    Raises:
        AttributeError: no such name; what does it here, where `ANSWERS` has it.
        UserError: a name of `ANSWERS` was set.
    """

    bundle: Bundle

    @property
    def unet(self) -> nn.Module:
        """The module of the network, to look at.

        Raises:
            AttributeError: it is a transformer.
        """
        return self._network("unet")

    @property
    def transformer(self) -> nn.Module:
        """The module of the network, to look at.

        Raises:
            AttributeError: it is a U-Net.
        """
        return self._network("transformer")

    def _network(self, part: str) -> nn.Module:
        if self.bundle.network.part != part:
            raise AttributeError(f"{part}: this model has none, but a {self.bundle.network.part}.")
        return self.bundle.network.module

    @property
    def vae(self) -> nn.Module:
        """The module of the autoencoder, to look at."""
        return self.bundle.autoencoder.module

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.bundle.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network."""
        return self.bundle.network.dtype

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the model: `Bundle.save`.

        Raises:
            UserError: see `Bundle.save`.
        """
        self.bundle.save(save_directory)

    if not TYPE_CHECKING:  # which would take every name for one that is here

        def __getattr__(self, name: str) -> object:
            if name in ANSWERS:
                raise AttributeError(f"{name}: {ANSWERS[name]}.")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        if name in ANSWERS:
            raise UserError(f"{name}: {ANSWERS[name]}.")
        object.__setattr__(self, name, value)

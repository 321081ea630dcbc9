"""Fine-tuning methods: the parameters that each one trains."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from latentdiff.bundle import Bundle
from latentdiff.diffusion import process as processes
from latentdiff.diffusion.process import DiscreteVP, zero_terminal_snr
from latentdiff.errors import UserError
from latentdiff.formats.controlnet import load_controlnet
from latentdiff.learning.finetune_config import FinetuneConfig, FinetuneObjective
from latentdiff.learning.inpainting_masks import with_mask_input
from latentdiff.learning.textual_inversion import WordRows, add_words, clips_of
from latentdiff.lora import add_lora
from latentdiff.models.control import ControlNetwork
from latentdiff.models.control_fit import check_control
from latentdiff.models.controlnet import ControlNet
from latentdiff.models.cross_attention_unet import CrossAttentionUNet

_EMBEDDING = (16, 32, 96, 256)  # widths of Stable Diffusion's ControlNets


def with_objective(bundle: Bundle, objective: FinetuneObjective) -> Bundle:
    """The model with another process or prediction, where the objective names one.

    Raises:
        UserError: the process and the prediction type do not go together.
    """
    process = processes.create(objective.process) if objective.process else bundle.process
    prediction = objective.prediction or bundle.prediction
    if objective.zero_terminal_snr:
        if not isinstance(process, DiscreteVP):
            raise UserError("objective.zero_terminal_snr is for discrete VP processes")
        process = DiscreteVP(zero_terminal_snr(process.betas))
    ends_in_noise = process.level(process.t_max).alpha == 0
    if objective.moves and ends_in_noise and prediction in ("eps", "score"):
        raise UserError(
            f"{prediction} says nothing about the last time of a process that ends without "
            "signal: objective.prediction=v"
        )
    return replace(bundle, process=process, prediction=prediction)


def make_trainable(bundle: Bundle, config: FinetuneConfig) -> Bundle:
    """The model with exactly those parameters requiring gradients that the method trains.

    Raises:
        UserError: the method does not fit the model.
    """
    if config.inpaint and bundle.kind != "inpainting":
        if config.method in ("lora", "textual-inversion"):
            raise UserError(
                f"{bundle.name} has no input for masks, which {config.method} cannot give it: "
                "--method full, or start from an inpainting model"
            )
        bundle = with_mask_input(bundle)
    if bundle.kind == "instruct-pix2pix":
        raise UserError(f"{bundle.name} is an instruct-pix2pix model, which is not trained here")
    for network in bundle.modules.values():
        network.requires_grad_(False)
    if config.method == "textual-inversion":
        bundle = add_words(bundle, config.inversion.tokens, config.inversion.start_from)
    elif config.method == "controlnet":
        if bundle.kind != "text-to-image":
            raise UserError(f"no ControlNet is trained beside an {bundle.kind} model")
    elif config.method == "lora":
        lora, tokens = config.lora, config.inversion.tokens
        if tokens:  # pivotal tuning: new words, and a LoRA that learns what they mean
            bundle = add_words(bundle, tokens, config.inversion.start_from)
        add_lora(
            bundle,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
            blocks=lora.blocks,
            text_encoder=lora.text_encoder,
            dropout=lora.dropout,
            seed=config.seed,
            kind=lora.kind,
        )
        for tower in clips_of(bundle).values() if tokens else ():
            words = tower.model.get_input_embeddings()
            assert isinstance(words, WordRows)
            words.rows.requires_grad_(True)
    else:
        bundle.network.module.requires_grad_(True)
        for encoder in bundle.conditioner.modules.values():
            encoder.requires_grad_(config.train_text)
    if config.gradient_checkpointing:
        unet: Any = bundle.network.module
        unet.enable_gradient_checkpointing()
    return bundle


def fresh_control(bundle: Bundle, config: FinetuneConfig) -> ControlNetwork:
    """A ControlNet beside the model, to be trained: one to go on from, or one that at first changes
    nothing.

    Raises:
        UserError: the U-Net is of another kind, or the embedding does not fit its latents; or
            the one to go on from cannot be read, or is of another model.
    """
    unet = bundle.network.module
    if not isinstance(unet, CrossAttentionUNet):
        raise UserError(f"{bundle.name}: a ControlNet is trained beside U-Nets of our own alone")
    if config.control.start is not None:
        begun = load_controlnet(config.control.start, device=bundle.device)
        check_control(begun, bundle.network, bundle.factor)
        return _to_train(begun.module, config)
    halvings = int(math.log2(bundle.factor))
    widths = config.control.embedding or [*_EMBEDDING, *[_EMBEDDING[-1]] * halvings][: halvings + 1]
    if 2 ** (len(widths) - 1) != bundle.factor:
        raise UserError(
            f"control.embedding: {len(widths)} widths halve a picture {len(widths) - 1} times, but "
            f"a latent of {bundle.name} is {bundle.factor} pixels wide"
        )
    settings = config.control
    module = ControlNet.beside(
        unet, widths, bundle.latent_channels, attention=settings.attention, seed=config.seed
    )
    return _to_train(module, config)


def _to_train(module: ControlNet, config: FinetuneConfig) -> ControlNetwork:
    if config.gradient_checkpointing:
        module.enable_gradient_checkpointing()
    return ControlNetwork(module.requires_grad_(True))


@contextmanager
def without_lora(module: nn.Module) -> Iterator[None]:
    """Inside the context the LoRA in a module's networks is off."""
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:  # enable_adapters would freeze weights, of which FSDP2 has two of each
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def without_dropout(bundle: Bundle) -> Iterator[None]:
    """Inside the context the U-Net and the text encoder compute as they do after training."""
    networks = bundle.network.module, *bundle.conditioner.modules.values()
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, mode in zip(networks, modes, strict=True):
            network.train(mode)

"""Tiny real models for tests: random weights, a tokenizer learned here, nothing mocked."""

from functools import cache
from typing import Any, Literal

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from latentdiff.bundle import Bundle, Steps
from latentdiff.diffusion import process as processes
from latentdiff.diffusion.prediction import Prediction
from latentdiff.diffusion.process import Process
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.conditioner import TextConditioner
from latentdiff.models.fresh_text import build_text_encoder, train_tokenizer
from latentdiff.models.network import DiffusersUNet
from latentdiff.models.text_encoders import ClipTower, T5Tower, TextTower
from latentdiff.models.unet import build_unet
from latentdiff.models.vae import build_vae

CAPTIONS = (
    "a red heart",
    "a green heart with an arrow",
    "a slice of pizza",
    "a grinning cat face",
    "the face of a sad dog, flat style",
    "a blue square",
    "the flag of a small island",
    "two people holding hands",
)
WIDTH = 16
WINDOW = 12


def tiny_bundle(
    *,
    prediction: Prediction = "v",
    process: str | Process = "vp-scaled-linear",
    steps: Steps | None = None,
    tower: Literal["clip", "t5"] = "clip",
    vae: Literal["kl", "vq"] = "kl",
    in_channels: int = 4,
    seed: int = 0,
    learned_variance: bool = False,
) -> Bundle:
    """A model of 16 x 16 pictures in 8 x 8 latents of 4 channels, with a two-level U-Net.

    With `in_channels` 9 it is an inpainting model, with 8 one of InstructPix2Pix.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        autoencoder = build_vae(vae, (8, 8), 1, 4, 4, 16, codes=32)
        autoencoder.register_to_config(scaling_factor=0.7)
        unet = build_unet(4, 8, (32, 32), 1, (True, False), 8, WIDTH, learned_variance)
        if in_channels != 4:
            wide = UNet2DConditionModel.from_config(unet.config, in_channels=in_channels)
            assert isinstance(wide, UNet2DConditionModel)
            unet = wide
        text = tiny_t5() if tower == "t5" else tiny_clip()
    for network in (autoencoder, unet, text.model):
        network.eval().requires_grad_(False)
    return bundle_of(
        autoencoder,
        unet,
        text,
        process=processes.create(process) if isinstance(process, str) else process,
        prediction=prediction,
        steps=steps or Steps(),
    )


def bundle_of(
    vae: Any,
    unet: UNet2DConditionModel,
    text: TextTower,
    process: Process,
    prediction: Prediction,
    steps: Steps | None = None,
) -> Bundle:
    """A model of the Stable Diffusion family out of its parts."""
    autoencoder = DiffusersAutoencoder(vae)
    return Bundle(
        autoencoder=autoencoder,
        conditioner=TextConditioner(text),
        network=DiffusersUNet(unet, autoencoder.channels),
        process=process,
        prediction=prediction,
        steps=steps or Steps(),
    )


def unet_of(bundle: Bundle) -> UNet2DConditionModel:
    """The U-Net of diffusers in a model."""
    unet = bundle.network.module
    assert isinstance(unet, UNet2DConditionModel)
    return unet


def vae_of(bundle: Bundle) -> Any:
    """The autoencoder of diffusers in a model."""
    return bundle.autoencoder.module


def tower_of(bundle: Bundle) -> TextTower:
    """The one text tower of a model."""
    assert isinstance(bundle.conditioner, TextConditioner)
    return bundle.conditioner.tower


def tiny_clip() -> TextTower:
    """A CLIP text tower of two layers with a byte-level BPE tokenizer."""
    tokenizer = clip_tokenizer()
    return ClipTower(build_text_encoder(tokenizer, WIDTH, 2, 2).eval(), tokenizer)


def tiny_t5() -> TextTower:
    """A T5 encoder of two layers with a unigram tokenizer."""
    tokenizer = t5_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return T5Tower(T5EncoderModel(config).eval(), tokenizer)


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE learned from the captions."""
    return train_tokenizer(CAPTIONS, 560, WINDOW)


@cache
def t5_tokenizer() -> T5Tokenizer:
    """Unigram over single letters and a few words."""
    words = sorted({f"▁{word}" for caption in CAPTIONS for word in caption.split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<pad>", "</s>", "<unk>", "▁", ",", *letters, *words]
    vocab = [(piece, -float(rank)) for rank, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=WINDOW)

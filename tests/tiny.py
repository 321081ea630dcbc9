"""Tiny real models for tests: random weights, a tokenizer learned here, nothing mocked.

Their weights are drawn by `draw_weights`: a network as diffusers and transformers begin it hardly
looks at some of its inputs, and so no comparison of pictures can tell whether it was given them.
`models/test_tiny_sees_everything.py` measures that here every input moves the output.
"""

import copy
import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from diffusers.models.adapter import T2IAdapter
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers.models.clip.configuration_clip import CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPVisionModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from latentdiff.bundle import Bundle, Steps
from latentdiff.diffusion import process as processes
from latentdiff.diffusion.prediction import Prediction
from latentdiff.diffusion.process import Process
from latentdiff.files import write_json
from latentdiff.formats import scheduler_config
from latentdiff.guidance import Classifier, Clip
from latentdiff.lora import add_lora, lora_of, save_lora
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.classifier import LatentClassifier
from latentdiff.models.clip_text import (
    ClipTextConfig,
    ClipTextEncoder,
    ClipTextEncoderWithProjection,
)
from latentdiff.models.conditioner import TextConditioner
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.models.fresh_clip import build_clip
from latentdiff.models.fresh_text import build_text_encoder, train_tokenizer
from latentdiff.models.image_prompts import AdapterSizes, IPAdapter, Projecting
from latentdiff.models.joined_conditioner import JoinedConditioner
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.network import (
    DiffusersUNet,
    LowResolution,
    Network,
    SizedUNet,
    UpscalingUNet,
)
from latentdiff.models.pixart import PixArtConditioner, PixArtNetwork
from latentdiff.models.pixart_transformer import PixArtTransformer
from latentdiff.models.text_encoders import ClipTower, PenultimateTower, T5Tower, TextTower
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
AnyModule = TypeVar("AnyModule", bound=nn.Module)
WIDTH = 16
WINDOW = 12
WIDTH_2, POOLED = 24, 20  # of the second encoder of Stable Diffusion XL, whose width tells it
# Layers whose output has not the variance of their input, but more or less.
GAINS = {
    "attn2.": 1.5,  # cross-attention averages over many states
    "time_embedding.": 1.5,
    "cond_proj.": 1.5,
    "controlnet_cond_embedding.": 2.0,  # after SiLU, of values in [0, 1]
    "adapter.conv_in.": 4.0,  # of values in [0, 1], whose means alone are large
    "add_embedding.": 1.5,
    "class_embedding.linear": 1.5,
    "class_embedding.weight": 11.0,  # a table, whose rows nothing multiplies
    "SelfAttention.q.": 0.35,  # T5 does not divide its logits by the root of a head's width of 8
}
# As published with PixArt-alpha.
PIXART_SCHEDULER: dict[str, object] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.22.0.dev0",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "lambda_min_clipped": -math.inf,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
    "variance_type": None,
}
# What the config of an autoencoder says of its latents; diffusers' pipelines read the scale alone.
STATISTICS: dict[str, dict[str, Any]] = {
    "scale": {"scaling_factor": 0.7},
    "shift": {"scaling_factor": 0.7, "shift_factor": 0.4},
    "channels": {
        "scaling_factor": 0.7,
        "latents_mean": [0.5, -1.0, 0.3, 2.0],
        "latents_std": [0.5, 1.0, 2.0, 4.0],
    },
}


def noise_picture(seed: int, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Image.Image:
    """Noise of a width and height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def tiny_bundle(
    *,
    prediction: Prediction = "v",
    process: str | Process = "vp-scaled-linear",
    steps: Steps | None = None,
    tower: Literal["clip", "t5"] = "clip",
    vae: Literal["kl", "vq"] = "kl",
    statistics: str = "scale",
    in_channels: int = 4,
    seed: int = 0,
    learned_variance: bool = False,
    guidance_width: int | None = None,
) -> Bundle:
    """A model of 16 x 16 pictures in 8 x 8 latents of 4 channels, with a two-level U-Net.

    With `in_channels` 9 it is an inpainting model, with 8 one of InstructPix2Pix; with a
    `guidance_width` it is told its guidance scale, as a latent consistency model is. `statistics`
    is a key of `STATISTICS`.
    """
    autoencoder = tiny_vae(vae, statistics, seed)
    outside = 8 if learned_variance else 4
    unet = tiny_unet(in_channels, outside, guidance_width=guidance_width, seed=seed)
    text = tiny_t5(seed) if tower == "t5" else tiny_clip(seed)
    for network in (autoencoder, unet, text.model):
        network.requires_grad_(False)
    return bundle_of(
        autoencoder,
        unet,
        text,
        process=processes.create(process) if isinstance(process, str) else process,
        prediction=prediction,
        steps=steps or Steps(),
    )


def tiny_upscaler(labels: Literal["table", "waves"] = "table", *, seed: int = 0) -> Bundle:
    """A model that makes 16 x 16 pictures of 8 x 8 ones, as Stable Diffusion's x4 upscaler does."""
    plain = tiny_bundle(prediction="v", seed=seed)
    vae_of(plain).register_to_config(scaling_factor=0.08333)
    made = LowResolution(processes.create("vp-linear"), 350, 2)
    unet = tiny_unet(7, labels=labels, seed=seed).requires_grad_(False)
    return replace(plain, network=UpscalingUNet(unet, 4, made), solver="ddim")


def tiny_xl(
    *,
    refiner: bool = False,
    in_channels: int = 4,
    prediction: Prediction = "eps",
    process: str = "vp-scaled-linear",
    steps: Steps | None = None,
    zero_empty: bool = True,
    guidance_width: int | None = None,
    seed: int = 0,
) -> Bundle:
    """A model of the Stable Diffusion XL family, of 16 x 16 pictures in 8 x 8 latents.

    It attends to states of two encoders [B, L, WIDTH + WIDTH_2], the refiner to those of the
    second, and is told a pooled vector [B, POOLED] and six numbers, the refiner five.
    """
    autoencoder = tiny_vae(seed=seed)
    encoders = {"text_encoder_2": tiny_penultimate(2, seed + 1)}
    if not refiner:
        encoders = {"text_encoder": tiny_penultimate(1, seed), **encoders}
    unet = tiny_xl_unet(in_channels, refiner=refiner, guidance_width=guidance_width, seed=seed)
    for network in (autoencoder, unet, *(tower.model for tower in encoders.values())):
        network.requires_grad_(False)
    conditioner = JoinedConditioner(encoders, zero_empty, refiner)
    return Bundle(
        autoencoder=DiffusersAutoencoder(autoencoder),
        conditioner=conditioner,
        network=SizedUNet(unet, 4),
        process=processes.create(process),
        prediction=prediction,
        steps=steps or Steps("leading", 1),
        solver="euler",
        family="stable-diffusion-xl",
    )


def tiny_pixart(
    *,
    sigma: bool = False,
    sizes: bool = False,
    side: int | None = None,
    window: int | None = None,
    seed: int = 0,
) -> Bundle:
    """A model of the PixArt family, of 16 x 16 pictures in 8 x 8 latents.

    Its transformer has two blocks over patches of 2 x 2 and attends to states of T5 [B, L, WIDTH].

    Args:
        sigma: whether it is PixArt-Sigma, whose prompts may be longer.
        sizes: whether it is told three numbers about the picture, as alpha's of 1024 pixels.
        side: of the latents that it was trained on, by its config; by default 8, but 128 with
            sizes, of which diffusers' pipelines tell no other.
        window: the most tokens of a prompt, if others.
        seed: of its weights.
    """
    autoencoder, text = tiny_vae(seed=seed), tiny_t5(seed)
    module = PixArtTransformer(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "caption_channels": WIDTH,
            "sample_size": side or (128 if sizes else 8),
            "use_additional_conditions": sizes,
            "interpolation_scale": 1,
        }
    )
    for network in (autoencoder, draw_weights(module, seed), text.model):
        network.requires_grad_(False)
    tower = T5Tower(text.model, text.tokenizer, window or (300 if sigma else 120))
    return Bundle(
        DiffusersAutoencoder(autoencoder),
        PixArtConditioner(tower, sizes),
        PixArtNetwork(module, 4),
        *scheduler_config.read(PIXART_SCHEDULER, "scheduler"),
        family="pixart",
    )


def xl_like() -> Bundle:
    """The shapes of Stable Diffusion XL as small as its rules allow: 32 groups, heads of 64, 256
    waves of each number. What its files do not tell is as published."""
    tokenizer = clip_tokenizer()
    encoders: dict[str, PenultimateTower] = {}
    for number, name in enumerate(("text_encoder", "text_encoder_2"), 1):
        text = ClipTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=WINDOW,
            hidden_act="quick_gelu" if number == 1 else "gelu",
        )
        words = copy.deepcopy(tokenizer)
        words.pad_token = words.pad_token if number == 1 else "!"
        with torch.random.fork_rng([]):
            model = (ClipTextEncoder if number == 1 else ClipTextEncoderWithProjection)(text)
        encoders[name] = PenultimateTower(draw_weights(model, number), words)
    with torch.random.fork_rng([]):
        vae = build_vae("kl", (32, 32), 1, 4, 32, 64)
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(32, 64),
            layers_per_block=1,
            transformer_layers_per_block=[1, 2],  # pyright: ignore[reportArgumentType]
            attention_head_dim=(1, 1),  # pyright: ignore[reportArgumentType]
            use_linear_projection=True,
            cross_attention_dim=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=32 + 6 * 256,
        )
    vae.register_to_config(scaling_factor=0.13025)
    networks = (draw_weights(vae, 0), draw_weights(unet, 0))
    for network in (*networks, *(tower.model for tower in encoders.values())):
        network.requires_grad_(False)
    return replace(
        tiny_xl(),
        autoencoder=DiffusersAutoencoder(vae),
        conditioner=JoinedConditioner(encoders, True, False),
        network=SizedUNet(unet, 4),
    )


def tiny_penultimate(number: Literal[1, 2], seed: int = 0) -> PenultimateTower:
    """The first text encoder of `tiny_xl`, or the second, whose tokenizer pads with another token
    and which has a projection."""
    tokenizer = copy.deepcopy(clip_tokenizer())
    end = tokenizer.eos_token_id
    config = ClipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH if number == 1 else WIDTH_2,
        intermediate_size=4 * WIDTH,
        projection_dim=POOLED,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=WINDOW,
        hidden_act="quick_gelu" if number == 1 else "gelu",
        eos_token_id=end,  # pyright: ignore[reportArgumentType]
    )
    if number == 2:
        tokenizer.pad_token = "!"
    kind = ClipTextEncoder if number == 1 else ClipTextEncoderWithProjection
    with torch.random.fork_rng([]):
        model = kind(config)
    return PenultimateTower(draw_weights(model, seed), tokenizer)


def tiny_xl_unet(
    in_channels: int = 4,
    *,
    refiner: bool = False,
    guidance_width: int | None = None,
    seed: int = 0,
) -> UNet2DConditionModel:
    """The U-Net of `tiny_xl`: no attention in its first level, two transformers in its second."""
    told: dict[str, Any] = {"addition_time_embed_dim": 8}
    told |= {"projection_class_embeddings_input_dim": POOLED + 8 * (5 if refiner else 6)}
    with torch.random.fork_rng([]):
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=in_channels,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            transformer_layers_per_block=[1, 2],  # pyright: ignore[reportArgumentType]
            attention_head_dim=(2, 4),  # pyright: ignore[reportArgumentType]
            use_linear_projection=True,
            cross_attention_dim=WIDTH_2 if refiner else WIDTH + WIDTH_2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            time_cond_proj_dim=guidance_width,
            addition_embed_type="text_time",
            **told,
        )
    return draw_weights(unet, seed)


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


def with_own_networks(bundle: Bundle) -> Bundle:
    """The same model, its U-Net and its KL autoencoder of our own classes."""
    unet = CrossAttentionUNet(json.loads(unet_of(bundle).to_json_string()))
    vae = KLAutoencoder(json.loads(vae_of(bundle).to_json_string()))
    unet.load_state_dict(unet_of(bundle).state_dict())
    vae.load_state_dict(vae_of(bundle).state_dict())
    for module in (unet, vae):
        module.eval().requires_grad_(False)
    autoencoder = DiffusersAutoencoder(vae)
    return replace(bundle, network=bundle.network.with_module(unet), autoencoder=autoencoder)


def unet_of(bundle: Bundle) -> Any:
    """The U-Net in a model: ours, or that of diffusers."""
    return bundle.network.module


def vae_of(bundle: Bundle) -> Any:
    """The autoencoder in a model: ours, or that of diffusers."""
    return bundle.autoencoder.module


def tower_of(bundle: Bundle) -> TextTower:
    """The one text tower of a model."""
    assert isinstance(bundle.conditioner, TextConditioner)
    return bundle.conditioner.tower


def tiny_unet(
    in_channels: int = 4,
    out_channels: int = 4,
    *,
    sizes: bool = False,
    guidance_width: int | None = None,
    labels: Literal["table", "waves"] | None = None,
    seed: int = 0,
) -> UNet2DConditionModel:
    """A U-Net of two levels whose first, last and middle blocks attend to states [B, L, WIDTH].

    Args:
        in_channels: of what it sees.
        out_channels: of what it says.
        sizes: whether it is also told pooled text "text_embeds" [B, WIDTH] and six numbers
            "time_ids" [B, 6] in `added_cond_kwargs`, as that of Stable Diffusion XL.
        guidance_width: G of the guidance scale [B, G] that it is told as "timestep_cond".
        labels: how it embeds the "class_labels" [B] that it is told; None where it is told none.
        seed: of its weights.
    """
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
    told: dict[str, Any] = {"table": {"num_class_embeds": 1000}}
    told["waves"] = {"class_embed_type": "timestep"}
    with torch.random.fork_rng([]):
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=(32, 32),
            layers_per_block=1,
            # diffusers reads `attention_head_dim` as the number of heads (its issue 2011).
            attention_head_dim=(4, 4),  # pyright: ignore[reportArgumentType]
            cross_attention_dim=WIDTH,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            time_cond_proj_dim=guidance_width,
            norm_num_groups=8,  # a group of one channel alone would erase the time
            **(added if sizes else {}),
            **told.get(labels or "", {}),
        )
    return draw_weights(unet, seed)


def tiny_control(*, sizes: bool = False, seed: int = 10, **config: Any) -> ControlNetModel:
    """A ControlNet beside `tiny_unet`, of control pictures of twice the side of the latents."""
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
    given: dict[str, Any] = {
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "attention_head_dim": (4, 4),
        "cross_attention_dim": WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "norm_num_groups": 8,
        "conditioning_embedding_out_channels": (8, 8),
        **(added if sizes else {}),
        **config,
    }
    with torch.random.fork_rng([]):
        control = ControlNetModel(**given)
    return draw_weights(control, seed)


def tiny_t2i_adapter(*, seed: int = 50, **config: Any) -> T2IAdapter:
    """A T2I-Adapter beside `tiny_unet`, of control pictures of twice the side of the latents."""
    given: dict[str, Any] = {"channels": [32, 32], "num_res_blocks": 2, "downscale_factor": 2}
    with torch.random.fork_rng([]):
        adapter = T2IAdapter(**given | config)
    return draw_weights(adapter, seed)


def tiny_ip_adapter(
    folder: Path,
    network: Network,
    kind: Projecting = "pooled",
    *,
    seed: int = 30,
) -> Path:
    """An IP-Adapter for a model, as it is published: its file, with `image_encoder` beside it.

    Pictures are seen at 12 x 12 pixels in 9 patches and a class token; "pooled" makes 4 tokens of
    them, "plus" 3 and "full" 10.
    """
    seen = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=10,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
        hidden_act="gelu",
    )
    unet: Any = network.module
    theirs = isinstance(unet, UNet2DConditionModel)
    own = CrossAttentionUNet(json.loads(unet.to_json_string())) if theirs else unet
    inside = 10 if kind == "pooled" else 16
    sizes = AdapterSizes(
        kind,
        inside,
        network.width,
        3 if kind == "plus" else 4,
        [layer.width for layer in own.cross_attention()],
        *((16, 1, 4, 64) if kind == "plus" else ()),  # whose depth and feed-forward diffusers fixes
    )
    with torch.random.fork_rng([]):
        encoder, adapter = CLIPVisionModelWithProjection(seen), IPAdapter(sizes)
    draw_weights(encoder, seed).save_pretrained(folder / "image_encoder")
    file = folder / "ip-adapter.safetensors"
    save_file(draw_weights(adapter, seed + 1).state_dict(), file)
    return file


def tiny_vae(
    kind: Literal["kl", "vq"] = "kl", statistics: str = "scale", seed: int = 0
) -> AutoencoderKL | VQModel:
    """An autoencoder of 16 x 16 pictures in 8 x 8 latents of 4 channels."""
    with torch.random.fork_rng([]):
        vae = build_vae(kind, (8, 8), 1, 4, 4, 16, codes=32)
    vae.register_to_config(**STATISTICS[statistics])
    return draw_weights(vae, seed)


def tiny_clip(seed: int = 0) -> ClipTower:
    """A CLIP text tower of two layers with a byte-level BPE tokenizer."""
    tokenizer = clip_tokenizer()
    with torch.random.fork_rng([]):
        model = build_text_encoder(tokenizer, WIDTH, 2, 2)
    return ClipTower(draw_weights(model, seed), tokenizer)


def tiny_t5(seed: int = 0) -> T5Tower:
    """A T5 encoder of two layers with a unigram tokenizer."""
    tokenizer = t5_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    with torch.random.fork_rng([]):
        model = T5EncoderModel(config)
    return T5Tower(draw_weights(model, seed), tokenizer)


def tiny_clip_of_pictures() -> Clip:
    """A CLIP of 12 x 12 pictures with one layer in each tower, that guides can score with."""
    with torch.random.fork_rng([]):
        model = build_clip(
            clip_tokenizer(), image_size=12, patch=4, width=16, layers=1, text_layers=1, heads=2
        )
    return Clip(draw_weights(model, 3).requires_grad_(False), clip_tokenizer())


def tiny_classifier() -> Classifier:
    """A classifier of noised latents of 4 channels with three labels."""
    with torch.random.fork_rng([]):
        network = LatentClassifier(4, ["cat", "dog", "heart"], 8)
    return Classifier(draw_weights(network, 4).requires_grad_(False))


def sd_like(version: int, levels: int = 3, layers: int = 2) -> Bundle:
    """The blocks of Stable Diffusion 1 or 2, as small as their 32 groups and their heads allow."""
    tokenizer = clip_tokenizer()
    unet = sd_unet(version, levels, layers)
    with torch.random.fork_rng([]):
        vae = build_vae("kl", (32, 32, 64), 1, 4, 4, 64)
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=1,
            max_position_embeddings=WINDOW,
            hidden_act="gelu" if version == 2 else "quick_gelu",
        )
        text = CLIPTextModel(config)
    for network in (unet, draw_weights(vae, version), draw_weights(text, version)):
        network.requires_grad_(False)
    return bundle_of(
        vae,
        unet,
        ClipTower(text, tokenizer),
        process=processes.create("vp-scaled-linear"),
        prediction="eps",
        steps=Steps("leading", 1, False),
    )


def sd_unet(version: int, levels: int = 3, layers: int = 2) -> UNet2DConditionModel:
    """The U-Net of `sd_like`, which attends to states [B, L, 64]."""
    crossing = [level < levels - 1 for level in range(levels)]
    with torch.random.fork_rng([]):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(32, 64, 64, 64)[:levels],
            layers_per_block=layers,
            down_block_types=tuple(
                "CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crossing
            ),
            up_block_types=tuple(
                "CrossAttnUpBlock2D" if c else "UpBlock2D" for c in crossing[::-1]
            ),
            cross_attention_dim=64,
            use_linear_projection=version == 2,
            attention_head_dim=(1,) * levels if version == 2 else 8,  # pyright: ignore[reportArgumentType]
        )
    return draw_weights(unet, version)


@torch.no_grad()
def draw_weights(network: AnyModule, seed: int) -> AnyModule:
    """Give a network weights with which whatever comes in matters, and set it to evaluation.

    Every layer keeps the variance of its input (LeCun et al. 1998, "Efficient BackProp", sec. 4.6),
    but for `GAINS`, so that a residual branch weighs about as much as what it is added to. No bias
    is zero and no norm is an identity. Scalars, as the temperature of CLIP, stay as they are.
    """
    random = torch.Generator().manual_seed(seed)
    for name, value in network.named_parameters():
        drawn = torch.randn(value.shape, generator=random)
        if value.ndim > 1:
            gain = math.prod(gain for part, gain in GAINS.items() if part in name)
            value.copy_(gain / math.sqrt(value[0].numel()) * drawn)
        elif name.endswith("weight"):  # of a norm
            value.copy_(1 + 0.2 * drawn)
        elif value.ndim == 1:
            value.copy_(0.1 * drawn)
    return network.eval()


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


def with_fast(folder: Path, steps: Steps | None = None) -> Path:
    """A model's folder with the LoRA and the schedule of few steps in it."""
    bundle = Bundle.load(folder, device="cpu")
    random = torch.Generator().manual_seed(0)
    for parameter in add_lora(bundle, rank=2, targets="all", seed=0):
        parameter.data.add_(torch.randn(parameter.shape, generator=random), alpha=0.05)
    save_lora(lora_of(bundle), folder / "fast/pytorch_lora_weights.safetensors")
    steps = steps or Steps("leading", within="leading", teacher_steps=50)
    schedule = scheduler_config.write(bundle.process, bundle.prediction, steps, "lcm")
    write_json(folder / "fast/scheduler_config.json", schedule, replace=False)
    return folder

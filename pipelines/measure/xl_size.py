"""Seconds and peak memory of a picture by a network of Stable Diffusion XL's size, 2.6 B weights.

    OMP_NUM_THREADS=2 python pipelines/measure/xl_size.py --size 512 --steps 1

It prints the seconds of making the weights, of the texts and each step (of both branches under
guidance), and of decoding; and the most memory that the process has had by then. The weights are
random, in bfloat16, and the model has all parts of the base: U-Net, autoencoder and both text
encoders, 3.5 B weights in all. What it draws is noise, in the time that a picture takes.
`--small` makes all layers a tenth as wide, to try the command out.
"""

import argparse
import copy
import itertools
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.bundle import Bundle, Steps
from latentdiff.diffusion import process
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.clip_text import (
    ClipTextConfig,
    ClipTextEncoder,
    ClipTextEncoderWithProjection,
)
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.models.engines import with_engine
from latentdiff.models.joined_conditioner import JoinedConditioner
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.network import SizedUNet
from latentdiff.models.text_encoders import PenultimateTower

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def configs(small: bool) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of the U-Net, the autoencoder and the two text encoders, as Stability published them."""
    part = 10 if small else 1
    unet = {
        "sample_size": 128,
        "block_out_channels": [320 // part, 640 // part, 1280 // part],
        "norm_num_groups": 32 if not small else 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20] if not small else [1, 1, 2],
        "cross_attention_dim": 2048 if not small else 192,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1280 // part + 6 * 256,
    }
    vae = {
        "block_out_channels": [128, 256, 512, 512] if not small else [32, 32, 64, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
    }
    first = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    second = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20}
    second["projection_dim"] = 1280 // part
    if small:
        first |= {"hidden_size": 64, "num_attention_heads": 1}
        second |= {"hidden_size": 128, "num_attention_heads": 2}
    for text, activation in ((first, "quick_gelu"), (second, "gelu")):
        text |= {"intermediate_size": 4 * text["hidden_size"], "hidden_act": activation}
    return unet, vae, first, second


@torch.no_grad()
def filled(make: Callable[[], AnyModule], random: torch.Generator) -> AnyModule:
    """A network in bfloat16 of random weights, whose layers keep the variance of what comes in."""
    with torch.device("meta"):
        network = make().to(torch.bfloat16)
    network = network.to_empty(device="cpu")
    for name, value in network.named_parameters():
        if value.ndim > 1:
            value.normal_(std=value[0].numel() ** -0.5, generator=random)
        else:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
    return network.eval().requires_grad_(False)


def random_model(small: bool, engine: Any) -> Bundle:
    """A model of the base's shape."""
    random = torch.Generator().manual_seed(0)
    unet, vae, *texts = configs(small)
    words: Any = next(iter(Bundle.load().conditioner.towers.values())).tokenizer
    towers: dict[str, PenultimateTower] = {}
    for config, name in zip(texts, ("text_encoder", "text_encoder_2"), strict=True):
        kind = ClipTextEncoder if name == "text_encoder" else ClipTextEncoderWithProjection
        tokenizer = copy.deepcopy(words)
        tokenizer.model_max_length = 77
        model = filled(lambda kind=kind, c=config: kind(ClipTextConfig(**c)), random)
        towers[name] = PenultimateTower(model, tokenizer)
    autoencoder = DiffusersAutoencoder(filled(lambda: KLAutoencoder(vae), random))
    network = SizedUNet(filled(lambda: CrossAttentionUNet(unet), random), 4)
    network, autoencoder = with_engine(network, autoencoder, engine)
    return Bundle(
        autoencoder=autoencoder,
        conditioner=JoinedConditioner(towers, zero_empty=True, aesthetic=False),
        network=network,
        process=process.create("vp-scaled-linear"),
        prediction="eps",
        steps=Steps("leading", 1),
        solver="euler",
        family="stable-diffusion-xl",
    )


def peak() -> float:
    """The most memory that this process has had, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a network of Stable Diffusion XL's size.")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--guidance-scale", type=float, default=5.0, help="1: half the work")
    parser.add_argument("--engine", default="eager", choices=["eager", "packed"])
    parser.add_argument("--small", action="store_true", help="a tenth as wide")
    given = parser.parse_args()
    try:
        start = time.perf_counter()
        bundle = random_model(given.small, given.engine)
        counts = {n: sum(p.numel() for p in m.parameters()) for n, m in bundle.modules.items()}
        print(", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in counts.items()))
        print(f"weights: {time.perf_counter() - start:.1f} s, peak {peak():.2f} GB", flush=True)
        times = [time.perf_counter()]
        output = LatentDiffusionPipeline(bundle)(
            "a red heart",
            height=given.size,
            width=given.size,
            num_inference_steps=given.steps,
            guidance_scale=given.guidance_scale,
            seed=0,
            output_type="latent",
            on_move=lambda *_: times.append(time.perf_counter()),
            progress=False,
        )
        steps = " ".join(f"{after - before:.1f}" for before, after in itertools.pairwise(times))
        print(f"texts and steps: {steps} s, peak {peak():.2f} GB", flush=True)
        start = time.perf_counter()
        with torch.no_grad():
            bundle.autoencoder.decode(output.latents)
        print(f"decoded: {time.perf_counter() - start:.1f} s, peak {peak():.2f} GB")
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

"""Most memory that a process needs for a picture, by each engine and in diffusers.

    python pipelines/measure/peak_memory.py --peers

Each contestant is a process that loads the model and draws two steps under guidance. Without
`--model` the model is of Stable Diffusion 1's size, with random weights, written to a scratch
folder in the precision of `--stored`: 2 or 4 GB. Peaks are what Linux counts, pages of mapped files
included. `--small` makes all layers a tenth as wide, to try the command out.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from latentdiff import UserError
from latentdiff.bundle import Bundle
from latentdiff.formats.location import find
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.clip_text import ClipTextConfig, ClipTextEncoder
from latentdiff.models.conditioner import TextConditioner
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.network import DiffusersUNet
from latentdiff.models.text_encoders import ClipTower

# Of the program alone: what getrusage tells includes the process that started it.
PEAK = """
from pathlib import Path
print(next(line for line in Path("/proc/self/status").open() if line.startswith("VmHWM")))
"""
OURS = """
import torch
from latentdiff import LatentDiffusionPipeline
from latentdiff.memory import keep_freed_memory
keep_freed_memory()
pipe = LatentDiffusionPipeline.from_pretrained({folder!r}, dtype="{dtype}", engine="{engine}")
pipe("a red heart", num_inference_steps=2, height={size}, width={size}, progress=False)
"""
THEIRS = """
import torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({folder!r}, torch_dtype=torch.{dtype})
pipe.set_progress_bar_config(disable=True)
pipe("a red heart", num_inference_steps=2, height={size}, width={size})
"""


def random_model(small: bool) -> Bundle:
    """A model of the shape of Stable Diffusion 1, with the vocabulary of the bundled one."""
    part = 10 if small else 1
    unet: dict[str, Any] = {"cross_attention_dim": 768 // part, "sample_size": 64}
    unet["block_out_channels"] = [width // part for width in (320, 640, 1280, 1280)]
    vae = {
        "block_out_channels": [128, 256, 512, 512] if not small else [32] * 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    }
    if small:
        unet |= {"norm_num_groups": 8, "cross_attention_dim": 64}
    width = 64 if small else 768
    text: dict[str, Any] = {"hidden_size": width, "num_attention_heads": width // 64}
    text |= {"intermediate_size": 4 * width, "num_hidden_layers": 12, "hidden_act": "quick_gelu"}
    bundled = Bundle.load(device="cpu")
    assert isinstance(bundled.conditioner, TextConditioner)
    words: Any = copy.deepcopy(bundled.conditioner.towers["text_encoder"].tokenizer)
    words.model_max_length = 77
    tower = ClipTower(filled(lambda: ClipTextEncoder(ClipTextConfig(**text))), words)
    return replace(
        bundled,
        network=DiffusersUNet(filled(lambda: CrossAttentionUNet(unet)), 4),
        autoencoder=DiffusersAutoencoder(filled(lambda: KLAutoencoder(vae))),
        conditioner=replace(bundled.conditioner, tower=tower),
        captions=(),
    )


@torch.no_grad()
def filled(make: Callable[[], Any]) -> Any:
    """A network of random weights, whose layers keep the variance of what comes in."""
    random = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        network: nn.Module = make()
    network = network.to_empty(device="cpu")
    for name, value in network.named_parameters():
        if value.ndim > 1:
            value.normal_(std=value[0].numel() ** -0.5, generator=random)
        else:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
    return network.eval().requires_grad_(False)


def peak(code: str) -> float:
    """The most memory that a process of this code had, in MiB."""
    done = subprocess.run([sys.executable, "-c", code + PEAK], check=True, stdout=-1, stderr=-3)
    return int(done.stdout.split()[-2]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of a picture.")
    parser.add_argument("--model", help="a folder; default: one of Stable Diffusion 1's size")
    parser.add_argument("--stored", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--peers", action="store_true", help="beside diffusers")
    parser.add_argument("--small", action="store_true", help="a tenth as wide")
    given = parser.parse_args()
    if sys.platform != "linux":
        parser.exit(2, "error: this reads what Linux counts\n")
    with TemporaryDirectory() as scratch:
        try:
            folder = find(given.model) if given.model else Path(scratch) / "model"
            if not given.model:
                bundle = random_model(given.small)
                bundle.save(folder, dtype=getattr(torch, given.stored))
        except UserError as error:
            parser.exit(2, f"error: {error}\n")
        told: dict[str, Any] = {"folder": str(folder), "dtype": given.dtype, "size": given.size}
        print(
            "| how | peak in MiB |",
            "|---|---|",
            f"| `import torch` | {peak('import torch;'):.0f} |",
            sep="\n",
        )
        for engine in ("eager", "packed"):
            print(f"| latentdiff, {engine} | {peak(OURS.format(engine=engine, **told)):.0f} |")
        if given.peers:
            print(f"| diffusers | {peak(THEIRS.format(**told)):.0f} |")


if __name__ == "__main__":
    main()

"""Measure the cost of training as pictures, resolution and processes grow, for docs/scale.md.

    python training/measure/data_scale.py

"measured" lines are CPU seconds of this process here; "calculated" ones follow from sizes alone.
"""

import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

from latentdiff.bundle import Bundle
from latentdiff.data.shards import list_shards
from latentdiff.files import writing
from latentdiff.learning.order import SampleOrder, WindowOrder

SD_UNET = 859_520_964  # parameters of Stable Diffusion 1.x's U-Net


def main() -> None:
    """Measure and calculate."""
    torch.set_num_threads(1)
    measure_shards()
    measure_orders()
    measure_steps()
    calculate()


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure_shards(count: int = 5000) -> None:
    """Listing and reading shards of 1,000 samples of 4 KiB."""
    with tempfile.TemporaryDirectory() as name:
        for first in range(0, count, 1000):
            shard = Path(name) / f"{first // 1000:05}.tar"
            with writing(shard, replace=False) as stage, tarfile.open(stage, "w") as tar:
                for number in range(first, first + 1000):
                    for extension, data in ((".png", bytes(4096)), (".txt", b"a red heart")):
                        member = tarfile.TarInfo(f"{number:09}{extension}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        pattern = Path(name) / f"{{00000..{count // 1000 - 1:05}}}.tar"
        listed = seconds(lambda: list_shards(pattern))
        examples = list_shards(pattern)
        read = seconds(lambda: [example.read() for example in examples])
    print(f"measured: a sample of a shard: listed {listed / count * 1e6:.0f} us", end=", ")
    print(f"read {read / count * 1e6:.0f} us")


def measure_orders() -> None:
    """The first batch of an epoch, the next one, and one far away."""
    orders = {
        "a folder of 10^6": SampleOrder(10**6, 0),
        "10^6 shards of 1,000, 8 at hand": WindowOrder([1000] * 10**6, 0, 8),
    }
    for name, order in orders.items():
        first, next_, far = (
            seconds(lambda step=step, own=order: own.batch(step, 256)) for step in (0, 1, 3000)
        )
        print(f"measured: order of {name}: {first:.2f} s, then {next_ * 1e3:.1f} ms", end=", ")
        print(f"far away {far * 1e3:.1f} ms")


def measure_steps(batch: int = 4) -> None:
    """Forward and backward of the bundled U-Net, float32, one thread."""
    unet: Any = Bundle.load(dtype="float32", device="cpu").network.module
    unet.train().requires_grad_(True)
    channels, width = unet.config["in_channels"], unet.config["cross_attention_dim"]
    random = torch.Generator().manual_seed(0)
    for side in (8, 16, 24):
        x = torch.randn(batch, channels, side, side, generator=random)
        text = torch.randn(batch, 24, width, generator=random)

        def step(x: torch.Tensor = x, text: torch.Tensor = text) -> None:
            unet(x, torch.full((batch,), 500.0), text).square().mean().backward()

        step()
        cost = min(seconds(step) for _ in range(3)) / batch
        print(f"measured: latents {side} x {side}: {cost:.3f} s a picture, one thread, float32")


def calculate() -> None:
    """Memory, traffic and cache, from sizes alone."""
    for name, parameters, latent in (
        ("emoji64 (17 M), 64 px", 17_000_000, 16 * 8 * 8),
        ("SD 1.x (860 M), 512 px", SD_UNET, 4 * 64 * 64),
    ):
        copies = {"weights": 4, "gradients": 4, "Adam": 8, "EMA": 4, "DDP's buckets": 4}
        memory = sum(copies.values()) * parameters / 1e9
        moments = 2 * latent * 4
        print(f"calculated: {name}: {memory:.1f} GB a process before activations ({copies} bytes")
        print(f"  a parameter); {8 * parameters / 1e9:.2f} GB sent by each process a step, at most")
        print(
            f"  a checkpoint {16 * parameters / 1e9:.1f} GB; latents {moments} B a picture:",
            end=" ",
        )
        print(", ".join(f"{count:.0e}: {count * moments / 1e9:,.0f} GB" for count in (1e6, 1e9)))


if __name__ == "__main__":
    typer.run(main)

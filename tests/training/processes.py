"""One process and two, with enough memory and with too little: the same losses.

    PYTHONPATH=.:tests python tests/training/processes.py

Prints one JSON object: by script and run, the loss and the learning rate of every step.
"""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from lab import Lab
from torch import nn

LONG = ["optim.steps=20", "optim.batch_size=8", "optim.warmup=5"]
LONG += ["checkpoint_every=20", "evaluate_every=20"]


def no_room_above(largest: int, backward: bool) -> None:
    """Have every U-Net of this process run out of memory for batches of more than `largest`."""

    def refuse(batch: int) -> None:
        if batch > largest:
            raise torch.OutOfMemoryError(f"no room for {batch}")

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, UNet2DConditionModel) and torch.is_grad_enabled():
            x = inputs[0]
            if backward:  # the gradient of the input comes last, when the weights have theirs
                x.requires_grad_(True).register_hook(lambda _: refuse(len(x)))
            else:
                refuse(len(x))

    nn.modules.module.register_module_forward_pre_hook(before)


def run(
    lab: Lab, out: str, largest: list[int], backward: bool = False, stage: str = "diffusion"
) -> list[list[float]]:
    """[loss, learning rate] of every step; `largest` is the room of each process, 0 for plenty."""
    world = len(largest)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def become(rank: int) -> None:
        """What `accelerate launch --cpu --num_processes` sets."""
        if world > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true",
                "GLOO_SOCKET_IFNAME": "lo",
            }
        if largest[rank]:
            no_room_above(largest[rank], backward)

    children = [
        lab.start(stage, out, *LONG, before=lambda at=rank: become(at)) for rank in range(world)
    ]
    for child in children:
        lab.ended(child, out, 0)
    rows = [json.loads(line) for line in (lab.folder / out / "log.jsonl").read_text().splitlines()]
    return [[row["loss"], row["lr"]] for row in rows if "loss" in row]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        lab = Lab(Path(name))
        lab.finish("autoencoder", "first", "optim.steps=1")
        (lab.folder / "vae").symlink_to(lab.folder / "first/vae")
        two = {
            "one": run(lab, "one", [0]),
            "one, no room in the backward pass": run(lab, "backward", [2], backward=True),
            "two": run(lab, "two", [0, 0]),
        }
        if "--all" in sys.argv:
            two["one, no room in the forward pass"] = run(lab, "forward", [2])
            for place in ("forward", "backward"):  # of the second process
                out = f"both, {place}"
                two[out] = run(lab, out, [0, 2], backward=place == "backward")
                said = (lab.folder / f"{out}.log").read_text()
                assert "micro-batches of 2 instead of 4" in said, said
        found = {"diffusion": two}
        print(json.dumps(found))


if __name__ == "__main__":
    main()

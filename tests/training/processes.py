"""One process and two, with whole and split weights, with enough memory and with too little: the
same losses.

    PYTHONPATH=.:tests python tests/training/processes.py

Prints one JSON object: by script and run, the loss and the learning rate of every step.
"""

import fcntl
import json
import os
import shutil
import socket
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from kills import content
from lab import SCRIPTS, Lab
from scripts import ROOT
from torch import distributed, nn

from latentdiff.learning.run import Run

CONFIGS = ROOT / "training/configs"
LONG = ["optim.steps=20", "optim.batch_size=8", "optim.warmup=5"]
LONG += ["precision=no", "checkpoint_every=20", "evaluate_every=20"]
MORE = {
    "diffusion": [],
    "finetune": ["prior.prompts=[a red disc]", "prior.count=4", "prior.steps=2"],
}


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


def split_weights() -> None:
    """Have Accelerate split weights over processors, which it does over accelerators only."""
    made = AcceleratorState.__init__

    def split(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        known = AcceleratorState._shared_state != {}
        made(self, *args, **kwargs)
        if known:  # all of them share one state
            return
        plan = yaml.safe_load((CONFIGS / "accelerate-fsdp.yaml").read_text())["fsdp_config"]
        self.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=plan["fsdp_version"],
            auto_wrap_policy=plan["fsdp_auto_wrap_policy"],
            transformer_cls_names_to_wrap=plan["fsdp_transformer_layer_cls_to_wrap"].split(","),
            reshard_after_forward=plan["fsdp_reshard_after_forward"],
            cpu_ram_efficient_loading=plan["fsdp_cpu_ram_efficient_loading"],
        )
        if self._mixed_precision != "no":
            self.fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = split


def refuse_rounded_times() -> None:
    """Have this process fail where the U-Net is told rounded times: bfloat16 has 8 bits of 1000."""

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, UNet2DConditionModel):
            assert inputs[1].dtype == torch.float32, inputs[1]

    nn.modules.module.register_module_forward_pre_hook(look)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def be_process(rank: int, world: int, port: int) -> None:
    """Set what torchrun sets, on a machine without a GPU."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def run(
    lab: Lab,
    out: str,
    largest: list[int],
    *changes: str,
    stage: str = "diffusion",
    backward: bool = False,
    split: bool = False,
) -> list[list[float]]:
    """[loss, learning rate] of every step; `largest` is the room of each process, 0 for plenty."""
    world = len(largest)
    port = free_port()

    def become(rank: int) -> None:
        if world > 1:
            be_process(rank, world, port)
        if split:
            split_weights()
        refuse_rounded_times()
        if largest[rank]:
            no_room_above(largest[rank], backward)

    children = [
        lab.start(stage, out, *LONG, *MORE[stage], *changes, before=lambda at=rank: become(at))
        for rank in range(world)
    ]
    for child in children:
        lab.ended(child, out, 0)
    rows = [json.loads(line) for line in (lab.folder / out / "log.jsonl").read_text().splitlines()]
    return [[row["loss"], row["lr"]] for row in rows if "loss" in row]


def short_in_bf16(lab: Lab) -> None:
    """Split weights have in bf16 what whole ones have."""
    short = ["precision=bf16", "optim.steps=2"]
    one = run(lab, "bf16 one", [0], *short)
    split = run(lab, "bf16 split", [0, 0], *short, split=True)
    gaps = [abs(a - b) for (a, _), (b, _) in zip(one, split, strict=True)]
    assert max(gaps) < 3e-3, gaps


def refused(lab: Lab) -> None:
    """No process of a second launch begins, whatever its rank; and no fp16 on a CPU."""
    out, began = lab.folder / "taken", lab.folder / "began"

    def begin(run: Run, objective: Any) -> None:
        group = distributed.distributed_c10d._get_default_group()
        patience = group._get_backend(run.device).options._timeout
        assert patience > timedelta(hours=1), patience
        began.touch()

    def two(expect: int) -> None:
        port = free_port()

        def become(rank: int) -> None:
            be_process(rank, 2, port)
            vars(SCRIPTS["diffusion"])["fit"] = begin

        for child in [
            lab.start("diffusion", out.name, before=lambda at=rank: become(at)) for rank in (0, 1)
        ]:
            lab.ended(child, out.name, expect)

    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        two(70)
    assert not began.exists()
    two(0)
    assert began.exists()
    lab.finish("diffusion", "half", "precision=fp16", expect=70)
    assert "precision fp16 is for GPUs" in (lab.folder / "half.log").read_text()


def resumed(lab: Lab, out: str, stage: str) -> None:
    """A run of split weights that goes on from its middle ends as it did, to the bit."""
    folder = lab.folder / out
    written = next(iter(folder.glob("model/unet/*.safetensors")), None)
    result = written or folder / "pytorch_lora_weights.safetensors"
    before = content(result)
    shutil.rmtree(folder / "checkpoints" / "step-00000020")
    result.unlink()
    run(lab, out, [0, 0], "checkpoint_every=10", stage=stage, split=True)
    assert f"resuming {folder} at step 10" in (lab.folder / f"{out}.log").read_text()
    assert content(result) == before, f"{out}: not the same weights after a resume"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        lab = Lab(Path(name))
        lab.finish("autoencoder", "first", "optim.steps=1")
        (lab.folder / "vae").symlink_to(lab.folder / "first/vae")
        lab.finish("diffusion", "second", "optim.steps=1")
        (lab.folder / "model").symlink_to(lab.folder / "second/model")
        refused(lab)
        short_in_bf16(lab)
        found: dict[str, dict[str, list[list[float]]]] = {}
        for stage in ("diffusion", "finetune") if "--all" in sys.argv else ("diffusion",):
            runs = found[stage] = {
                "one": run(lab, f"{stage} one", [0], stage=stage),
                "no room": run(lab, f"{stage} backward", [2], stage=stage, backward=True),
                "two": run(lab, f"{stage} two", [0, 0], stage=stage),
            }
            out = f"{stage} split"
            runs["split"] = run(lab, out, [0, 0], "checkpoint_every=10", stage=stage, split=True)
            if "--all" not in sys.argv:
                continue
            resumed(lab, out, stage)
            runs["no room in the forward pass"] = run(lab, f"{stage} forward", [2], stage=stage)
            for place in ("forward", "backward"):  # of the second process
                out = f"{stage} both, {place}"
                runs[out] = run(lab, out, [0, 2], stage=stage, backward=place == "backward")
                said = (lab.folder / f"{out}.log").read_text()
                assert "micro-batches of 2 instead of 4" in said, said
        print(json.dumps(found))


if __name__ == "__main__":
    main()

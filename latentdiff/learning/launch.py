"""The launcher of a run, as its environment variables tell it, before Accelerate obeys them."""

import os

import torch

from latentdiff.errors import UserError

LAUNCHED = "ACCELERATE_DYNAMO_MODE"  # which each of Accelerate's launchers sets, and nobody else
_SPLITTERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def refuse_split(how: str) -> UserError:
    """The mistake of a launch that splits the weights as this run cannot."""
    return UserError(
        f"this run cannot split its weights over the processes by {how}: launch with "
        "training/configs/accelerate-ddp.yaml (accelerate-fsdp.yaml for diffusion.py, and for "
        "finetune.py but textual inversion and adamw-8bit)"
    )


def check_launch() -> None:
    """Pass a launch by a configuration that training can follow.

    Raises:
        UserError: it asks for DeepSpeed or Megatron-LM.
    """
    for name, library in _SPLITTERS.items():
        if os.environ.get(name, "").lower() == "true":
            raise refuse_split(library)


def spreads_over_cpus() -> bool:
    """Tell whether the processes are several on a machine without a GPU that they could share.

    Accelerate then takes each for a run of its own, unless it is told that they are of the CPU.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return several and (device is None or device.type == "mps")


def crowded() -> str | None:
    """A line where other work holds the processors: the load of the last minute, before this run
    adds its own, is more than there are."""
    load, count = os.getloadavg()[0], os.cpu_count() or 1
    if load <= count:
        return None
    return (
        f"other work holds the processors (load {load:.1f} on {count}): this run will take several "
        "times as long; end that work, or stop this (Ctrl-C) and start it again later"
    )


def overridden(precision: str) -> str | None:
    """A line where the launcher's mixed precision is not the run's own, which counts."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched in ("no", precision):
        return None
    return (
        f"training with precision={precision}; the launcher's mixed_precision {launched} does not "
        f"count: precision={launched} in the run's own settings does"
    )

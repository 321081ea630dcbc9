"""Weights split over the processes by FSDP2: gathered for a save or a picture, split at a resume.

Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel". A split tensor
is a DTensor, of which each process holds a part; with whole weights everything here does nothing.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from latentdiff.bundle import Bundle
from latentdiff.learning.denoising import Conditioned


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor; if it is split, every process must ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(whole: Tensor, part: Tensor) -> Tensor:
    """A whole tensor, or this process's part of it where `part`, of its shape, is split."""
    if not isinstance(part, DTensor) or whole.shape != part.shape:
        return whole
    return distribute_tensor(whole.to(part.device), part.device_mesh, part.placements)


def split_again(module: nn.Module) -> None:
    """Have FSDP2 free the whole weights that a forward pass without a backward pass has left: until
    then a module's parameters are these, and not its parts of them."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


class Shown:
    """A model in training as a whole, to draw pictures with and to save.

    Whole weights are shown as they are. Of split ones `twin`, of the main process, is a copy in the
    computer's memory. Make it before the module is prepared.
    """

    def __init__(
        self, bundle: Bundle, module: Conditioned, device: torch.device, *, split: bool, main: bool
    ) -> None:
        self.bundle, self.module, self.device, self.split = bundle, module, device, split
        self.twin: Bundle | None = None
        if split and main:
            copied = copy.deepcopy((bundle.network, bundle.conditioner))
            self.twin = replace(bundle, network=copied[0], conditioner=copied[1])
            self._move(torch.device("cpu"))

    @contextmanager
    def whole(self) -> Iterator[Bundle]:
        """The model with its present weights, for the main process; every process must ask."""
        if not self.split:
            yield self.bundle
            return
        held = self.twin and dict(Conditioned(self.twin).named_parameters())
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            value = gathered(parameter.detach())
            if held is not None:
                held[name].data.copy_(value)
        self._move(self.device)
        yield self.twin or self.bundle
        self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        if self.twin is not None:
            for module in (self.twin.network.module, *self.twin.conditioner.modules.values()):
                nn.Module.to(module, device)

"""Networks that a model is extended by: they stand beside its own and go where it is."""

import copy
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class Extension:
    """A network that stands beside a model's own; threads may share it.

    Attributes:
        module: its weights.
    """

    module: nn.Module

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def on(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same extension there; a copy where it is elsewhere now."""
        if (self.device, self.dtype) == (device, dtype):
            return self
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        modules = {name: one for name, one in held.items() if isinstance(one, nn.Module)}
        moved = {name: copy.deepcopy(one).to(device, dtype) for name, one in modules.items()}
        return replace(self, **moved)

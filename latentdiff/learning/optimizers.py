"""The optimizers that a fine-tune may be given, and the rates of its parts."""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from latentdiff.errors import UserError
from latentdiff.learning.config import OptimConfig
from latentdiff.learning.trained import adamw

OptimizerName = Literal["adamw", "adamw-8bit", "prodigy", "schedule-free", "muon"]
Group = dict[str, object]


def make_optimizer(
    parameters: Iterator[nn.Parameter],
    name: OptimizerName,
    optim: OptimConfig,
    text: Sequence[nn.Parameter] = (),
    text_lr: float | None = None,
) -> Optimizer:
    """The optimizer of this name over two groups, the text encoders' parameters in the second.

    Each group has a `factor`, by which its learning rate differs from the run's own.

    Args:
        text: parameters of the text encoders; those not among `parameters` do not count.
        text_lr: their learning rate; None: as all others have.

    Raises:
        UserError: the package for it is not installed, or torch is older than it.
    """
    known = {id(parameter) for parameter in text}
    trained = list(parameters)
    own = [p for p in trained if id(p) not in known]
    factor = 1.0 if text_lr is None else text_lr / optim.lr
    groups: list[Group] = [
        {"params": part, "factor": times}
        for part, times in ((own, 1.0), ([p for p in trained if id(p) in known], factor))
        if part
    ]
    return _MAKERS[name](groups, optim)


def _adamw_8bit(groups: list[Group], optim: OptimConfig) -> Optimizer:
    make = _installed("adamw-8bit", "bitsandbytes.optim", "8bit").AdamW8bit
    return make(groups, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)


def _prodigy(groups: list[Group], optim: OptimConfig) -> Optimizer:
    """Mishchenko & Defazio 2023, algorithm 4: Adam whose step size is d, an estimate of how far the
    weights have to go. Bias correction and the safeguard let a warm-up do what it says."""
    made = _installed("prodigy", "prodigyopt", "train").Prodigy(
        groups, lr=optim.lr, betas=optim.betas, use_bias_correction=True, safeguard_warmup=True
    )
    for group in made.param_groups:  # given at first, it would print a line
        group["weight_decay"] = optim.weight_decay
    return made


def _schedule_free(groups: list[Group], optim: OptimConfig) -> Optimizer:
    """Defazio et al. 2024, "The Road Less Scheduled": an average takes the schedule's place."""
    make = _installed("schedule-free", "schedulefree", "train").AdamWScheduleFree
    made = make(groups, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    made.train()
    return made


class Muon(Optimizer):
    """Muon for matrices, AdamW for all other parameters: one optimizer over one state.

    Jordan et al. 2024: the momentum of a matrix is made orthogonal. Its steps are scaled to the
    size of AdamW's (Liu et al. 2025, eq. 4), so both go by the same learning rate.
    """

    def __init__(self, groups: list[Group], optim: OptimConfig) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UserError("optimizer muon needs torch 2.9 or newer")
        parted: list[Group] = []
        for group in groups:
            matrices = [p for p in _parameters(group) if p.ndim == 2]
            others = [p for p in _parameters(group) if p.ndim != 2]
            parted += [{**group, "params": some} for some in (matrices, others) if some]
        super().__init__(parted, {"lr": optim.lr})
        self.parts: list[Optimizer] = []
        for group in self.param_groups:
            params = group["params"]
            if params[0].ndim == 2:
                part: Optimizer = torch.optim.Muon(
                    params,
                    lr=optim.lr,
                    weight_decay=optim.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            else:
                part = adamw([{"params": params}], optim)
            group.update({k: v for k, v in part.param_groups[0].items() if k not in group})
            self.parts.append(part)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of each part, on the state and the groups that are saved and loaded as one."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]
            part.step()


_MAKERS: dict[OptimizerName, Callable[[list[Group], OptimConfig], Optimizer]] = {
    "adamw": adamw,
    "adamw-8bit": _adamw_8bit,
    "prodigy": _prodigy,
    "schedule-free": _schedule_free,
    "muon": Muon,
}


def _parameters(group: Group) -> list[Tensor]:
    params = group["params"]
    assert isinstance(params, list)
    return params


def _installed(name: str, module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"optimizer {name} needs: pip install 'latentdiff[{extra}]'") from error

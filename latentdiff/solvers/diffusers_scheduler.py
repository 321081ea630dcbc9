"""Any scheduler object of diffusers as a solver."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.prediction import Prediction, target
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.diffusion.solver import eps_of
from latentdiff.diffusion.timetable import Timetable, of_times
from latentdiff.errors import UserError

PREDICTIONS: Mapping[str, Prediction] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
    "score": "score",
}
"""Prediction types by their names in diffusers; "score" is ours."""

_DRAW_NOISE = ("Ancestral", "DDPM", "LCM", "TCD", "SDE", "SASolver", "UnCLIP")


class _State(NamedTuple):
    """A scheduler of this run alone, and which of its calls is next."""

    scheduler: Any
    call: int


@dataclass(frozen=True)
class DiffusersScheduler:
    """A scheduler object of diffusers as a solver, through its own `timetable()` only.

    Each run works on a copy, so the object given stays as it is. Noise comes from the pictures'
    streams. After a jump back a new copy begins at the level reached.

    Args:
        scheduler: a diffusers scheduler with one or two calls a step. (PNDM has four: take the
            solver "pndm" or "plms" instead.)
        process: what its betas, or its flow, are; see `latentdiff.bundle`.
        steps: number of steps of the run.

    Raises:
        UserError: an object of another kind.
    """

    scheduler: Any
    process: Process
    steps: int
    order: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        kind = type(self.scheduler).__name__
        if not hasattr(self.scheduler, "set_timesteps") or kind == "PNDMScheduler":
            raise UserError(f"{kind} cannot be run as a solver.")

    @property
    def stochastic(self) -> bool:
        """True where the scheduler draws noise, by its class or its settings."""
        kind, config = type(self.scheduler).__name__, self.scheduler.config
        if any(name in kind for name in _DRAW_NOISE) or config.get("stochastic_sampling"):
            return True
        return str(config.get("algorithm_type", "")).startswith("sde-")

    def timetable(self) -> Timetable:
        """The levels that the scheduler steps between, from noise to clean data."""
        times = [float(t) for t in self._fresh().timesteps]
        if hasattr(self.scheduler, "state_in_first_order"):
            times = times[::2]  # a step asks at its beginning, and once more
        return of_times(self.process, times)

    def init(self) -> _State | None:
        return None

    def _fresh(self) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps)
        return scheduler

    def step(
        self,
        denoise: Denoiser,
        x: Tensor,
        here: NoiseLevel,
        there: NoiseLevel,
        state: _State | None,
        noise: NoiseStreams,
    ) -> tuple[Tensor, _State]:
        scheduler, index = state or self._begin(here)
        takes_noise = "generator" in inspect.signature(scheduler.step).parameters
        draws = {"generator": noise.generators} if takes_noise else {}
        held = x / _scale(scheduler, here)
        level = here
        while True:
            t = scheduler.timesteps[index]
            if hasattr(scheduler, "is_scale_input_called"):
                scheduler.scale_model_input(held, t)
            output = self._output(denoise, held * _scale(scheduler, level), level)
            held = scheduler.step(output, t, held, **draws, return_dict=False)[0]
            index += 1
            whole = getattr(scheduler, "state_in_first_order", True)
            if whole or index == len(scheduler.timesteps):
                return held * _scale(scheduler, there), _State(scheduler, index)
            level = self.process.level(float(scheduler.timesteps[index]))

    def _begin(self, here: NoiseLevel) -> _State:
        scheduler = self._fresh()
        distances = [abs(float(t) - here.t) for t in scheduler.timesteps]
        index = max(k for k, far in enumerate(distances) if far == min(distances))
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(index)
        return _State(scheduler, index)

    def _output(self, denoise: Denoiser, x: Tensor, level: NoiseLevel) -> Tensor:
        """Convert the estimate to the prediction type that the scheduler expects."""
        config, estimate = self.scheduler.config, denoise(x, level)
        x0, v = estimate.x0, estimate.variance
        kind = str(getattr(config, "prediction_type", "flow"))
        prediction = PREDICTIONS.get(kind, "flow")
        output = target(prediction, x0, eps_of(x, x0, level), level.alpha, level.sigma)
        told = config.get("variance_type") == "learned_range"
        return torch.cat([output, v], 1) if told and v is not None else output


def _scale(scheduler: Any, level: NoiseLevel) -> float:
    """x over what the scheduler holds: those in sigma hold x / alpha, the others x."""
    if not hasattr(scheduler, "sigmas") or hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        return 1.0
    return 1.0 if type(scheduler).__name__.startswith("FlowMatch") else level.alpha

"""EDM's churn: a little noise is added before a step, and the step is made from there."""

import math
from dataclasses import dataclass

from torch import Tensor

from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel, Process, transition


@dataclass(frozen=True)
class Churn:
    """Karras et al. 2022 (EDM), algorithm 2, lines 4-6, with sigma read as sigma / alpha.

    Args:
        process: the process of the raised level; no level is raised beyond its noisiest.
        s_churn: amount of noise over the whole run.
        steps: number of steps of the run.
        s_min: sigma / alpha below which nothing is added.
        s_max: sigma / alpha above which nothing is added.
        s_noise: inflation of the added noise.
    """

    process: Process
    s_churn: float
    steps: int
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def raise_level(
        self, x: Tensor, here: NoiseLevel, noise: NoiseStreams
    ) -> tuple[Tensor, NoiseLevel]:
        """x [B, C, H, W] and its level, both noisier where churn applies."""
        gamma = min(self.s_churn / self.steps, math.sqrt(2) - 1)
        highest = self.process.level(self.process.t_max).ratio
        ratio = min(here.ratio * (1 + gamma), highest)
        if not self.s_min <= here.ratio <= self.s_max or ratio <= here.ratio:
            return x, here
        raised = self.process.level_of_ratio(ratio)
        scale, std = transition(here, raised)
        return scale * x + self.s_noise * std * noise.like(x), raised

"""Prompts that change from step to step, as `[a:b:0.5]` of A1111 does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import Branch, ConditionedDenoiser, Estimate
from latentdiff.diffusion.process import NoiseLevel


@dataclass(slots=True)
class StepCount:
    """The move that a run is making, from 0."""

    move: int = 0


def scheduled(
    denoise: ConditionedDenoiser,
    conditions: Sequence[Sequence[Condition]],
    stretches: Sequence[int],
    count: StepCount,
) -> ConditionedDenoiser:
    """Denoise under those conditions that are due in the move that the run is making.

    It goes around the network's own denoiser, below guidance and further prompts, which know the
    conditions of the first stretch alone.

    Args:
        denoise: out of a network.
        conditions: of each branch, one for each stretch of moves with the same texts.
        stretches: for each move, the number of its stretch.
        count: the move, which the run keeps.
    """
    if not any(stretches):
        return denoise
    later = {id(series[0]): series for series in conditions}
    known: dict[tuple[int, int], tuple[Branch, Branch]] = {}

    def due(branch: Branch, stretch: int) -> Branch:
        key = id(branch), stretch
        if key not in known:
            if len(known) == 256:  # a guidance that makes new branches at each step
                known.clear()
            condition = later[id(branch.condition)][stretch]
            # with the branch itself, so that its id stays its own
            known[key] = branch, replace(branch, condition=condition)
        return known[key][1]

    def now(x: Tensor, level: NoiseLevel, branches: Sequence[Branch]) -> tuple[Estimate, ...]:
        stretch = stretches[count.move]
        if stretch:
            branches = [due(branch, stretch) for branch in branches]
        return denoise(x, level, branches)

    return now

"""Lower orders towards the end of a run, for multistep solvers that are told its levels."""

from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.timetable import Timetable


def lowered(order: int, ending: Timetable, here: NoiseLevel) -> int:
    """The order of a step from `here`: at most the number of steps that are left in the run.

    So the last step is of first order and the last but one of second, as the code of Lu et al.
    2022 (DPM-Solver++) has it for runs of few steps, and that of Zhao et al. 2023 (UniPC) for all.

    Args:
        order: of the solver.
        ending: the levels of the run; none lower nothing.
        here: where the step begins.
    """
    left = sum(level.log_snr > here.log_snr for level in ending) if ending else order
    return max(1, min(order, left))

"""Timetables that jump back up: RePaint's schedule, and what edits see of each other's jumps."""

from itertools import pairwise

from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.timetable import Timetable


def jump_schedule(steps: int, jump_length: int, resamples: int, start: float = 1.0) -> list[int]:
    """The times of Lugmayr et al. 2022 (RePaint), appendix B, with one jump length.

    Args:
        steps: t_T, how many times the run has: steps - 1 .. 0, and -1 for clean data.
        jump_length: number of levels that a jump goes back up.
        resamples: how often the times below a jump's top are gone through.
        start: jumps go no higher than this part of the run.

    Returns:
        For (6, 2, 2): 5, 4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0, -1.
    """
    top = min(steps, int(start * steps))
    left = dict.fromkeys(range(0, top - jump_length, jump_length), resamples - 1)
    times, t = [], steps
    while t >= 1:
        t -= 1
        times.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            times += range(t + 1, t + jump_length + 1)
            t += jump_length
    return [*times, -1]


def with_jumps(
    timetable: Timetable, jump_length: int, resamples: int, start: float
) -> list[NoiseLevel]:
    """A timetable with RePaint's jumps in each of its descents; see `jump_schedule`."""
    levels: list[NoiseLevel] = []
    for run in descents(timetable):
        last = len(run) - 1
        levels += [run[last - 1 - t] for t in jump_schedule(last, jump_length, resamples, start)]
    return levels


def descents(timetable: Timetable) -> list[list[NoiseLevel]]:
    """A timetable cut before each jump back up: one piece where there is none."""
    runs = [[timetable[0]]]
    for here, there in pairwise(timetable):
        if there.log_snr < here.log_snr:
            runs.append([])
        runs[-1].append(there)
    return runs


def first_visits(timetable: Timetable) -> list[NoiseLevel]:
    """The timetable that the jumps were put into: each level where it is first reached."""
    levels = [timetable[0]]
    for level in timetable:
        if level.log_snr > levels[-1].log_snr:
            levels.append(level)
    return levels

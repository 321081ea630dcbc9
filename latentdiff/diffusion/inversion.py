"""Inversion: from a picture back to its noise, by running an ODE solver backwards."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.solver import Solver, ddim_move
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError


def invert(
    denoise: Denoiser,
    solver: Solver,
    timetable: Timetable,
    x: Tensor,
    *,
    refinements: int = 1,
) -> Tensor:
    """The x at the first level from which the solver's steps lead to these data.

    Each step begins as DDIM inversion: Song et al. 2021 (DDIM), section 4.3, a first-order step
    up. Then the solver's own step down is taken from there, and what it misses is added, again and
    again (fixed-point inversion: Pan et al. 2023, AIDI, eq. 9, for any solver). Without
    refinements this is plain DDIM inversion, whatever the solver.

    Args:
        denoise: (x_t, level) -> x_0; guidance of scale 1 inverts best.
        solver: a deterministic one. Of a multistep solver each step stands alone.
        timetable: from noise to data without jumps, its last noisy level as near to the data as may
            be ("karras" and "exponential" end there): below it x_t is taken for alpha * x_0.
        x: data [B, C, H, W].
        refinements: corrections of each step; each costs one step of the solver.

    Returns:
        [B, C, H, W] at timetable[0].

    Raises:
        UserError: the timetable jumps or is too short, refinements are negative, or the solver
            draws noise.
    """
    levels = [level for level in timetable if level.sigma > 0]
    if len(levels) < 2 or any(a.log_snr >= b.log_snr for a, b in pairwise(levels)):
        raise UserError("inversion needs a timetable of two levels or more that only goes down.")
    if refinements < 0:
        raise UserError(f"refinements must not be negative, but {refinements} were asked.")
    if solver.stochastic:
        raise UserError("inversion needs a solver that draws no noise, as 'heun'.")
    noise = NoiseStreams([0] * len(x))  # for the protocol; deterministic solvers draw none
    x = levels[-1].alpha * x
    for clean, noisy in pairwise(reversed(levels)):
        target = x
        x = ddim_move(target, denoise(target, clean).x0, clean, noisy)
        # Along the probability flow of unit data x grows as its standard deviation does.
        growth = math.hypot(noisy.alpha, noisy.sigma) / math.hypot(clean.alpha, clean.sigma)
        for _ in range(refinements):
            reached, _ = solver.step(denoise, x, noisy, clean, solver.init(), noise)
            x = x + growth * (target - reached)
    return x


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate two noises along the sphere: Shoemake 1985 (Animating Rotation), section 3.3.

    A straight line would pass through noise that is too small.

    Args:
        a, b: [B, ...]; each picture by itself.
        weight: 0 is a, 1 is b.
    """
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    lengths = flat_a.norm(dim=1) * flat_b.norm(dim=1)
    cosine = ((flat_a * flat_b).sum(1) / lengths.clamp(min=1e-12)).clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    straight = sine < 1e-4  # the same direction, or the opposite one: the way is a line
    divisor = torch.where(straight, 1.0, sine)
    share_a = torch.where(straight, 1 - weight, torch.sin((1 - weight) * angle) / divisor)
    share_b = torch.where(straight, weight, torch.sin(weight * angle) / divisor)
    shape = (-1, *(1,) * (a.ndim - 1))
    return share_a.view(shape) * a + share_b.view(shape) * b

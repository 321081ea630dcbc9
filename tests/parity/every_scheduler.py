"""Every scheduler of diffusers beside our solver: `python tests/parity/every_scheduler.py`.

It prints docs/schedulers.md. The fake network is input-dependent; x_t is compared after every step,
and the table tells the largest difference relative to the largest value.
"""

import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from schedulers import CONFIG, SEED, VP, build, follows, initial, network, ours, theirs, visits

from latentdiff import solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.denoiser import network_denoiser
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.solvers import LCM, TCD, DPMpp3M, SASolver, Solver

THEIRS: Any = diffusers
Trails = tuple[list[Tensor], list[Tensor]]
LEVELS = timetable.create("karras", VP, 16)


class TheirThirdOrder(DPMpp3M):
    """With half of the second derivative."""

    def _correction(self, x0: Tensor, h: float, history: list[tuple[Tensor, float]]) -> Tensor:
        right = super()._correction(x0, h, history)
        if len(history) == 1:
            return right
        (before, h_before), (oldest, h_oldest) = history
        bend = (x0 - before) / h_before - (before - oldest) / h_oldest
        bend = bend * h**2 / (h_before + h_oldest)
        return right + ((math.expm1(-h) / h + 1) / h - 0.5) * bend


class TheirSASolver(SASolver):
    """With the term that diffusers adds where two levels are interpolated.

    Their slope's weight, h^2 / 2 (1 + tau^2) instead of the integral of e^((1 + tau^2)(l - h)) l,
    is over the share 1 - e^(-(1 + tau^2) h) that the mean is multiplied with.
    """

    def _mean(self, known: Sequence[tuple[float, Tensor]], start: float, end: float) -> Tensor:
        mean = super()._mean(tuple(known), start, end)
        if len(known) != 2:
            return mean
        rate, h = 1 + self.tau**2, end - start
        exact = (h * rate - 1 + math.exp(-rate * h)) / rate**2
        (place, x0), (other, x0_other) = known
        slope = (x0 - x0_other) / (place - other)
        return mean + rate * (h**2 / 2 - exact) * slope / -math.expm1(-rate * h)


def in_sigma(
    kind: str, solver: Solver | str, skip_last: int = 0, **config: Any
) -> Callable[[], Trails]:
    """A scheduler that takes any levels."""

    def run() -> Trails:
        scheduler = build(getattr(THEIRS, kind), "eps", "trailing", **config)
        other = theirs(scheduler, lambda s: follows(s, LEVELS))
        made = solvers.create(solver, VP) if isinstance(solver, str) else solver
        mine = ours(made, LEVELS, "eps")
        return mine[: len(mine) - skip_last], other[: len(other) - skip_last]

    return run


def in_times(
    kind: str, solver: str, spacing: str = "leading", **config: Any
) -> Callable[[], Trails]:
    """A scheduler at the times of one of our timetables."""

    def run() -> Trails:
        levels = timetable.create(spacing, VP, 20)
        scheduler = build(getattr(THEIRS, kind), "eps", spacing, **config)
        return ours(solvers.create(solver, VP), levels, "eps"), theirs(
            scheduler, lambda s: visits(s, levels)
        )

    return run


def two_stage(kind: str, solver: str) -> Callable[[], Trails]:
    def run() -> Trails:
        levels = timetable.create("trailing", VP, 10)
        scheduler = build(getattr(THEIRS, kind), "eps", "trailing")
        mine = ours(solvers.create(solver, VP), levels, "eps")
        return mine, theirs(scheduler, lambda s: s.set_timesteps(10))

    return run


def single_step() -> Trails:
    """DPMSolverSinglestep takes its middles from the timetable."""
    levels = timetable.create("exponential", VP, 8)
    halves = [VP.level_of_ratio(math.sqrt(a.ratio * b.ratio)) for a, b in pairwise(levels[:-1])]
    finer = [level for pair in zip(levels, halves, strict=False) for level in pair]
    finer += levels[-2:]
    scheduler = THEIRS.DPMSolverSinglestepScheduler(**CONFIG)
    other = theirs(scheduler, lambda s: follows(s, finer))
    return ours(solvers.create("dpmpp-2s", VP), levels, "eps")[:-1], other[1:-1:2]


def pndm() -> Trails:
    levels = timetable.create("leading", VP, 20)
    scheduler = build(
        THEIRS.PNDMScheduler, "eps", "leading", skip_prk_steps=True, set_alpha_to_one=True
    )
    other = theirs(scheduler, lambda s: s.set_timesteps(20))
    return ours(solvers.create("plms"), levels, "eps"), other[1:]


def ipndm() -> Trails:
    def prepare(scheduler: Any) -> None:
        scheduler.set_timesteps(len(LEVELS) - 1)
        scheduler.alphas = torch.tensor([level.alpha for level in LEVELS])
        scheduler.betas = torch.tensor([level.sigma for level in LEVELS])
        scheduler.timesteps = torch.tensor([level.t for level in LEVELS[:-1]])

    other = theirs(THEIRS.IPNDMScheduler(), prepare)
    return ours(solvers.create("ipndm"), LEVELS, "v"), other


def lcm() -> Trails:
    scheduler = THEIRS.LCMScheduler(**CONFIG)
    other = theirs(scheduler, lambda s: s.set_timesteps(4))
    levels = [*(VP.level(float(t)) for t in scheduler.timesteps), VP.data_level()]
    return ours(LCM(), levels, "eps"), other


def tcd() -> Trails:
    times = [979, 700, 500, 240]
    scheduler = THEIRS.TCDScheduler(**CONFIG)
    other = theirs(scheduler, lambda s: s.set_timesteps(timesteps=times), eta=0.5)
    levels = [*(VP.level(t) for t in times), VP.data_level()]
    return ours(TCD(VP, 0.5), levels, "eps")[:-1], other[:-1]


def sa_solver() -> Trails:
    settings: dict[str, Any] = {"predictor_order": 2, "corrector_order": 2}
    scheduler = build(THEIRS.SASolverScheduler, "eps", "trailing", **settings)
    scheduler.tau_func = lambda t: 1.0
    other = theirs(scheduler, lambda s: follows(s, LEVELS))
    return ours(TheirSASolver(), LEVELS, "eps")[:-1], other[:-1]


def along(
    where: process.Process, prediction: Any, solver: str, levels: Sequence[NoiseLevel]
) -> list[Tensor]:
    trail: list[Tensor] = []
    sampling.sample(
        network_denoiser(network, where, prediction),
        solvers.create(solver, where),
        levels,
        initial() * where.prior_scale(levels[0]),
        noise=NoiseStreams(SEED),
        callback=lambda index, level, x: trail.append(x),
    )
    return trail


def flow(kind: str, solver: str) -> Callable[[], Trails]:
    """A flow-matching scheduler holds x_t itself, and a network's output is the velocity."""

    def run() -> Trails:
        where = process.Flow(1000.0)
        scheduler: Any = getattr(THEIRS, kind)()
        scheduler.set_timesteps(8)
        x, trail, generator = initial(), [], torch.Generator().manual_seed(SEED)
        draws = {"generator": generator} if "LCM" in kind else {}
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(1)), t, x, **draws).prev_sample
            trail.append(x)
        levels = timetable.of_times(where, [float(t) for t in scheduler.timesteps])
        return along(where, "flow", solver, levels), trail

    return run


def edm(kind: str, solver: str) -> Callable[[], Trails]:
    """EDM's own preconditioning, for data of unit variance; its schedulers hold x_t."""

    def run() -> Trails:
        where = process.create("edm")
        scheduler: Any = getattr(THEIRS, kind)(sigma_data=1.0, prediction_type="v_prediction")
        scheduler.set_timesteps(16)
        levels = timetable.create("karras", where, 16)
        x, trail = initial() * where.prior_scale(levels[0]), []
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t), t.expand(1))
            x = scheduler.step(output, t, x).prev_sample
            trail.append(x)
        return along(where, "v", solver, levels), trail

    return run


SAME: dict[str, tuple[str, Callable[[], Trails]]] = {
    "DDIMScheduler": ("ddim", in_times("DDIMScheduler", "ddim", clip_sample=False)),
    "DDIMParallelScheduler": ("ddim", in_times("DDIMParallelScheduler", "ddim", clip_sample=False)),
    "DDPMScheduler": ("ddpm", in_times("DDPMScheduler", "ddpm", clip_sample=False)),
    "DDPMParallelScheduler": ("ddpm", in_times("DDPMParallelScheduler", "ddpm", clip_sample=False)),
    "EulerDiscreteScheduler": ("euler", in_times("EulerDiscreteScheduler", "euler")),
    "EulerAncestralDiscreteScheduler": (
        "euler-a",
        in_times("EulerAncestralDiscreteScheduler", "euler-a"),
    ),
    "HeunDiscreteScheduler": ("heun", in_times("HeunDiscreteScheduler", "heun")),
    "KDPM2DiscreteScheduler": ("dpm2", two_stage("KDPM2DiscreteScheduler", "dpm2")),
    "KDPM2AncestralDiscreteScheduler": (
        "dpm2-a",
        two_stage("KDPM2AncestralDiscreteScheduler", "dpm2-a"),
    ),
    "LMSDiscreteScheduler": ("lms", in_times("LMSDiscreteScheduler", "lms", "trailing")),
    "PNDMScheduler": ("plms, pndm", pndm),
    "IPNDMScheduler": ("ipndm", ipndm),
    "DEISMultistepScheduler": (
        "deis, deis-2",
        in_sigma("DEISMultistepScheduler", "deis", 1, solver_order=3),
    ),
    "DPMSolverMultistepScheduler": (
        "dpmpp-2m, dpm-solver-1, dpmpp-2m-sde",
        in_sigma("DPMSolverMultistepScheduler", "dpmpp-2m"),
    ),
    "DPMSolverMultistepScheduler of order 3": (
        "dpmpp-3m with half of its second derivative",
        in_sigma("DPMSolverMultistepScheduler", TheirThirdOrder(), solver_order=3),
    ),
    "DPMSolverSinglestepScheduler": ("dpmpp-2s, dpm-solver-2", single_step),
    "UniPCMultistepScheduler": (
        "unipc, unipc-bh1, unipc-3",
        in_sigma("UniPCMultistepScheduler", "unipc", final_sigmas_type="zero"),
    ),
    "SASolverScheduler": ("sa-solver with one more term", sa_solver),
    "LCMScheduler": ("lcm", lcm),
    "TCDScheduler": ("tcd", tcd),
    "FlowMatchEulerDiscreteScheduler": (
        "euler",
        flow("FlowMatchEulerDiscreteScheduler", "euler"),
    ),
    "FlowMatchLCMScheduler": ("consistency", flow("FlowMatchLCMScheduler", "consistency")),
    "EDMEulerScheduler": ("euler", edm("EDMEulerScheduler", "euler")),
    "EDMDPMSolverMultistepScheduler": (
        "dpmpp-2m",
        edm("EDMDPMSolverMultistepScheduler", "dpmpp-2m"),
    ),
}

OTHERS: dict[str, str] = {
    "DPMSolverSDEScheduler": "`dpmpp-sde`: the same method, but its noise is a Brownian tree of "
    "torchsde with a seed of its own, so no run can be compared step by step",
    "FlowMatchHeunDiscreteScheduler": "`heun` makes the trapezoidal rule in sigma / alpha, "
    "this one in t: another method of order 2",
    "DDIMInverseScheduler": "`diffusion.inversion` runs any solver backwards",
    "DPMSolverMultistepInverseScheduler": "`diffusion.inversion` runs any solver backwards",
    "RePaintScheduler": "RePaint is an edit here, for every solver: docs/editing.md; its jumps end "
    "up to n - 1 original steps from where they should",
    "CosineDPMSolverMultistepScheduler": "`dpmpp-2m-sde`'s method on a cosine process of its own "
    "for audio, with a Brownian tree of torchsde",
    "CMStochasticIterativeScheduler": "`consistency`, with boundary conditions of EDM's networks, "
    "whose config is no latent model's",
    "ScoreSdeVeScheduler": "`pc` on `ve`: its step size is that of the batch, ours of each picture",
    "ScoreSdeVpScheduler": "`euler-maruyama` on `vp-continuous`: its dt is 1 / n, but its times "
    "lie (1 - 0.001) / (n - 1) apart",
    "KarrasVeScheduler": "`heun` with `Churn`; deprecated there",
    "UnCLIPScheduler": "DDPM; deprecated there in favour of DDPMScheduler",
    "DDPMWuerstchenScheduler": "DDPM on a continuous cosine process of that model alone",
    "CogVideoXDDIMScheduler": "for one video model",
    "CogVideoXDPMScheduler": "for one video model",
    "LTXEulerAncestralRFScheduler": "for one video model",
    "HeliosScheduler": "for one video model",
    "HeliosDMDScheduler": "for one video model",
    "MiniMaxH3Scheduler": "rectified flow by `euler`, with that model's own shift",
    "SCMScheduler": "for distilled models of Sana-Sprint",
    "PiflowScheduler": "for one kind of distilled model",
    "FlowMapEulerDiscreteScheduler": "for flow maps, which take two times",
    "ConsistencyDecoderScheduler": "for one decoder",
    "RFD4ProteinaScheduler": "for proteins",
    "AmusedScheduler": "for tokens, not for a diffusion of numbers",
    "BlockRefinementScheduler": "for tokens, not for a diffusion of numbers",
    "DiscreteDDIMScheduler": "for tokens, not for a diffusion of numbers",
    "EntropyBoundScheduler": "for tokens, not for a diffusion of numbers",
    "VQDiffusionScheduler": "for tokens, not for a diffusion of numbers",
}

HEAD = """# The schedulers of diffusers, and ours

Every scheduler class of diffusers 0.42.1, our solver of the same method, and the largest difference
between the two after any step, relative to the largest value, in float32 with one input-dependent
fake network and the same noise. Made by `python tests/parity/every_scheduler.py >
docs/schedulers.md`; `tests/parity/` holds each of them to 1e-4 with more predictions, timetables
and settings, and says where diffusers deviates. Any of its scheduler objects also runs as a solver:
`latentdiff.solvers.diffusers_scheduler.DiffusersScheduler`.

| diffusers | here | largest difference |
|---|---|---|"""

NOTES = """
- **DPMSolverMultistep of order 3** takes the divided difference, half of the second derivative, for
  the derivative itself (as the authors' code and k-diffusion).
  `test_their_third_order_is_of_order_2` measures order 2; `dpmpp-3m` has order 3.
- **SASolver** with two levels adds a term of third order that its paper does not have
  ("empirically we find it will slightly improve"); with it ours is theirs, without it the
  difference is above 1e-4.
- DEIS takes log(0) in the step to clean data, SASolver lowers its order there and TCD ends at
  t = 0: those last steps are left out.

## Others

| diffusers | why there is nothing to compare |
|---|---|"""


def largest(trails: Trails) -> float:
    """The largest difference after any step, relative to the largest value."""
    mine, other = trails
    assert len(mine) == len(other) > 2
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, other, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(HEAD)
    for name, (here, run) in SAME.items():
        print(f"| {name} | `{here}` | {largest(run()):.0e} |", flush=True)
    print(NOTES)
    for name, reason in OTHERS.items():
        print(f"| {name} | {reason} |")

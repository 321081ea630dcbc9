"""Every scheduler of diffusers beside our solver: `python tests/parity/every_scheduler.py`.

It prints docs/schedulers.md from the table of `latentdiff.formats.scheduler_classes` and from the
comparisons here, runs with an input-dependent fake network that `test_every_scheduler.py` makes.
"""

import json
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
from latentdiff.formats.scheduler_classes import CLASSES, Key, Keys, Row, SchedulerClass
from latentdiff.formats.scheduler_config import MENDED
from latentdiff.solvers import LCM, TCD, Consistency, DPMpp3M, Euler, Heun, SASolver, Solver

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
    scheduler = build(THEIRS.SASolverScheduler, "eps", "trailing")
    other = theirs(scheduler, lambda s: follows(s, LEVELS))
    solver = SASolver(noisy=(200, 800), as_in_code=True)
    return ours(solver, LEVELS, "eps")[:-1], other[:-1]


def along(
    where: process.Process, prediction: Any, solver: Solver, levels: Sequence[NoiseLevel]
) -> list[Tensor]:
    trail: list[Tensor] = []
    sampling.sample(
        network_denoiser(network, where, prediction),
        solver,
        levels,
        initial() * where.prior_scale(levels[0]),
        noise=NoiseStreams(SEED),
        callback=lambda index, level, x: trail.append(x),
    )
    return trail


def flow(kind: str, solver: Solver) -> Callable[[], Trails]:
    """A flow-matching scheduler holds x_t itself, and a network's output is the velocity."""

    def run() -> Trails:
        where = process.Flow(1000.0)
        scheduler: Any = getattr(THEIRS, kind)()
        scheduler.set_timesteps(8)
        x, trail, generator = initial(), [], torch.Generator().manual_seed(SEED)
        draws = {"generator": generator} if "LCM" in kind else {}
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(1)), t, x, **draws).prev_sample
            half = not getattr(scheduler, "state_in_first_order", True)
            if not half or len(trail) == 7:  # the last step has one half
                trail.append(x)
        times = list(dict.fromkeys(scheduler.timesteps.tolist()))
        levels = timetable.of_times(where, times)
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
        return along(where, "v", solvers.create(solver, where), levels), trail

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
    "SASolverScheduler": ("sa-solver as in code, with noise at times 200 to 800", sa_solver),
    "LCMScheduler": ("lcm", lcm),
    "TCDScheduler": ("tcd", tcd),
    "FlowMatchEulerDiscreteScheduler": (
        "euler",
        flow("FlowMatchEulerDiscreteScheduler", Euler()),
    ),
    "FlowMatchHeunDiscreteScheduler": (
        "heun of the velocity in t",
        flow("FlowMatchHeunDiscreteScheduler", Heun(velocity=True)),
    ),
    "FlowMatchLCMScheduler": ("consistency", flow("FlowMatchLCMScheduler", Consistency())),
    "EDMEulerScheduler": ("euler", edm("EDMEulerScheduler", "euler")),
    "EDMDPMSolverMultistepScheduler": (
        "dpmpp-2m",
        edm("EDMDPMSolverMultistepScheduler", "dpmpp-2m"),
    ),
}

OTHERS: dict[str, str] = {
    "DPMSolverSDEScheduler": "`dpmpp-sde`: the same method, but its noise is a Brownian tree of "
    "torchsde with a seed of its own, so no run can be compared step by step",
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

Made by `python tests/parity/every_scheduler.py > docs/schedulers.md` for diffusers 0.42.1.

## Solvers

Every scheduler class and our solver of the same method. `tests/parity/` holds x after every step
to 1e-4 of its largest value, in float32 with an input-dependent fake network and the same noise,
and the pixels of a tiny model to 1e-4, with more predictions, timetables and settings. Any of
diffusers' scheduler objects also runs as a solver:
`latentdiff.solvers.diffusers_scheduler.DiffusersScheduler`.

| diffusers | here |
|---|---|"""

NOTES = """
- **DPMSolverMultistep of order 3** takes the divided difference, half of the second derivative, for
  the derivative itself (as the authors' code and k-diffusion).
  `test_their_third_order_is_of_order_2` measures order 2; `dpmpp-3m` has order 3.
- **SASolver** with two levels adds a term of third order that its paper does not have ("empirically
  we find it will slightly improve"): a setting here, `as_in_code`.
- DEIS takes log(0) in the step to clean data, SASolver lowers its order there and TCD ends at
  t = 0: those last steps are left out.

### Others

| diffusers | why there is nothing to compare |
|---|---|"""

KEYS = """
## What is read of a `scheduler_config.json`

A model folder's config names one of these classes and holds its keys. A key that is left out has
that class's own default. Each key of the class is **read**, or **without effect** on its pictures,
or works with some values only and is **refused** with others, in a line that names the class, the
key and the value; any other class is refused, too. Keys of other classes, which diffusers'
`from_config` carries along into the saved file, are without effect, as there. (Two of them are not:
`sigma_min` and `sigma_max` bound the ramps of sigmas of every class that is marked +; with
`sigma_min` such a run must end at clean data.)

What is read draws the picture that diffusers draws: `tests/parity/test_saved_schedulers.py` saves
each class with each spacing, ramp of sigmas, end and prediction, alone and by `from_config` from
Stable Diffusion's config, and compares pixels to 1e-4; it changes every key of every class, and
holds the statements of this table to what happens.

The **end** is where a run of the model's own solver ends: at clean data, or at the noise of the
first time. With any other `--solver`, or at other times, it ends at clean data.

**Another solver** (`--solver X`, `solver="x"`) changes the method alone: its levels stay those of
the folder, as its own class and keys space them, but for that end. `--timetable` names others.
diffusers' `pipe.scheduler = X.from_config(pipe.scheduler.config)`, which does the same here,
changes the class: keys that the file has stay, those that it leaves out get the defaults of X (of
EulerDiscreteScheduler "linspace", where PNDMScheduler has "leading"), and X spaces the times.

"""

MENDING = """### Pipelines

Some pipelines of diffusers set keys of their scheduler whatever its file says. The pipeline that
`model_index.json` names decides, here too; a single file is one of StableDiffusionPipeline. (If it
also names another scheduler than the scheduler's own file, a warning says so.)
"""

WHERE_THEY_DIFFER = """
- **The first x** of Euler, Euler ancestral, Heun, KDPM2, KDPM2 ancestral, LMS and DPMSolverSDE is
  sigma times noise with the spacings "linspace" and "trailing". x = alpha x_0 + sigma noise has the
  variance alpha^2 + sigma^2 = 1 for data of unit variance, as their "leading" and all other classes
  have it; sigma^2 alone, 0.995 in Stable Diffusion, is that of x without data. Their multistep
  classes begin a rectified flow at t = 999 with 1, where alpha^2 + sigma^2 is 0.998. Ours begins
  with alpha^2 + sigma^2.
- **DDIM, PNDM** move x from t to t - T // n whatever the spacing, and ask the network next at the
  next time of the spacing. With "leading" both are the same, with "trailing" where n divides T;
  elsewhere x does not have the noise that the network is told. Ours moves to the time it asks at.
- **PNDM with v** averages the network's v of several times. What its method averages is the noise,
  alpha v + sigma x, whose alpha, sigma and x are those of each time.
- **PNDM without skip_prk_steps and with an odd T // n** asks at T // n // 2 above a time and moves
  x to T // n // 2 below the one before, one apart.
- **DPMSolverMultistep of order 3**: see above.
- **UniPC with B1(h)** multiplies infinity with 0 in the step to clean data: its pictures are NaN.
- **DDPM with variance_type fixed_large** draws noise of the whole kernel in its last step unless
  that begins at time 0 (Ho et al. 2020, algorithm 2, has none there).
- **flow_prediction without use_flow_sigmas** takes sigma / alpha for sigma: x - sigma / alpha v is
  x_0 in no process. Ours reads the flow, noise - x_0, of the process that the config says.
- LMS starts an image-to-image run with weights of a history that it does not have.
- TCD's `eta` is no key: its own step takes 0.3, as ours; a pipeline's call passes 0.
"""


def largest(trails: Trails) -> float:
    """The largest difference after any step, relative to the largest value."""
    mine, other = trails
    assert len(mine) == len(other) > 2
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, other, strict=True))


def means(row: Row) -> str:
    """A solver of the table, and which keys say so."""
    settings = [
        f"{name} {f'as `{value.name}`' if isinstance(value, Key) else told(value)}"
        for name, value in row.settings.items()
    ]
    name = f"`{row.solver}`" + (f" with {', '.join(settings)}" if settings else "")
    return f"{name} for {_all(row.when)}" if row.when else name


def told(value: object) -> str:
    """As a config has it."""
    return json.dumps(value).strip('"')


def refused(kind: SchedulerClass) -> str:
    """Values that work, values that do not, and combinations that do not."""
    parts = [f"`{key}` other than {_any(values)}" for key, values in kind.only.items()]
    parts += [f"`{key}` {_any(values)}" for key, values in kind.never.items()]
    parts += [_all(clash) for clash in kind.clashes]
    return "; ".join(parts) or "-"


def _any(values: tuple[object, ...]) -> str:
    return " or ".join(told(value) for value in values)


def _all(keys: Keys) -> str:
    return " with ".join(f"`{key}` {told(value)}" for key, value in keys.items())


ENDS = {
    "clean": "at clean data",
    "sigma_min": "at the first time",
    "set_alpha_to_one": "where `set_alpha_to_one` says",
    "final_sigmas_type": "where `final_sigmas_type` says",
}


def keys_of(kind: SchedulerClass) -> list[str]:
    """The part of the page on one class."""
    fixed = {key for key, values in kind.only.items() if len(values) == 1}
    read = [key for key in kind.defaults if key not in kind.idle and key not in fixed]
    plus = " +" if kind.ranged and "sigma_min" not in kind.defaults else ""
    return [
        f"- means: {'; '.join(means(row) for row in kind.rows)}; ends {ENDS[kind.end]}",
        f"- read: {', '.join(f'`{key}` ({told(kind.defaults[key])})' for key in read)}{plus}",
        f"- without effect: {', '.join(f'`{key}`' for key in sorted(kind.idle)) or '-'}",
        f"- refused: {refused(kind)}",
    ]


def page() -> str:
    """docs/schedulers.md."""
    lines = [HEAD]
    lines += [f"| {name} | `{here}` |" for name, (here, _) in SAME.items()]
    lines += [NOTES, *(f"| {name} | {reason} |" for name, reason in OTHERS.items()), KEYS.rstrip()]
    alike: dict[int, list[str]] = {}
    for name, kind in CLASSES.items():
        alike.setdefault(id(kind), []).append(name)
    for names in alike.values():
        lines += ["", f"### {', '.join(names)}", "", *keys_of(CLASSES[names[0]])]
    lines += ["", MENDING, *(f"- {name}: {_all(keys)}" for name, keys in MENDED.items())]
    lines += ["", "## Where pixels differ", "", WHERE_THEY_DIFFER.strip()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(page(), end="")

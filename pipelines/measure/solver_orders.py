"""Measure every solver on a mixture of Gaussians, whose denoiser is known, and table the results.

    python pipelines/measure/solver_orders.py > docs/solvers.md

Of a deterministic solver: the order of convergence between 96 and 192 steps even in log-SNR,
against the probability flow integrated to 1e-11. Of every solver: the Kolmogorov-Smirnov distance
between 20,000 draws of 80 steps and the data. No model and no network is needed.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from latentdiff import solvers
from latentdiff.diffusion import process, timetable
from latentdiff.diffusion.denoiser import Estimate
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import mixture
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.sampling import sample
from latentdiff.solvers import Solver
from latentdiff.solvers.embedded_pairs import rk45

WEIGHTS, MEANS, STDS = [0.3, 0.5, 0.2], [-1.0, 1.2, 0.1], [0.4, 0.3, 0.5]
DATA = mixture(WEIGHTS, [[mean] for mean in MEANS], STDS)
WHERE = process.create("vp-scaled-linear")
# Where t is a smooth function of log-SNR: on a discrete process it has a kink at each whole time,
# which those that interpolate in t see at hundreds of steps.
SMOOTH = process.create("vp-continuous")

HEAD = """# Solvers

Every solver by name, as `latentdiff solvers` lists them, measured on a mixture of three Gaussians
whose denoiser is known in closed form. Made by
`python pipelines/measure/solver_orders.py > docs/solvers.md`.

- **order**: declared, and measured between 96 and 192 steps even in log-SNR of `vp-continuous` (a
  multistep solver's first steps are shortened so that its start does not dominate). That of a
  stochastic solver is the order of its covariance; `tests/core/test_stochastic.py` measures it
  without drawing.
- **calls**: of the network, a step, in the long run.
- **KS**: Kolmogorov-Smirnov distance of 20,000 draws to the data, 80 steps of the timetable
  `karras` on `vp-scaled-linear`. Chance alone makes 0.006 to 0.01.

| solver | what it is | order | measured | calls | KS |
|---|---|---|---|---|---|"""

NOTES = """
Few-step solvers (`consistency`, `lcm`, `tcd`) take x_0 for a draw of the data, as distilled
networks give it; the denoiser here gives the mean, so their KS is that of another method than they
are made for. `pc` and those of Langevin dynamics have the bias of Langevin steps of finite size.
Adaptive solvers choose their own steps; their calls are those of the whole run, which is given up
after 2,000, as where RePaint's jumps have it begin anew again and again.

`dpmpp-2m` loses a factor ln(n) in n steps that are even in t from pure noise (alpha = 0) on: with
s = alpha / sigma the step at s = k / n has the length 1 / k in log-SNR, so that its error is
1 / (k n^2), and the sum of these is ln(n) / n^2. `tests/core/test_convergence.py` measures it.

Beside diffusers, scheduler by scheduler: [schedulers.md](schedulers.md). On the bundled model, and
why `dpmpp-2m` is the default: [comparison.md](comparison.md).
"""


@dataclass
class Counted:
    """The denoiser, and how often it was asked."""

    calls: int = field(default=0)

    def __call__(self, x: Tensor, level: NoiseLevel) -> Estimate:
        self.calls += 1
        return DATA(x, level)


def levels_of(steps: int, order: int) -> list[NoiseLevel]:
    """Even in log-SNR, with the short first steps that a multistep solver of this order needs."""
    whole = math.log(5 / 0.1)
    h = whole / steps
    lengths = [h ** max(1.0, order / (k + 1)) for k in range(order)]
    rest = whole - sum(lengths)
    lengths += [rest / round(rest / h)] * round(rest / h)
    places = torch.tensor([0.0, *lengths], dtype=torch.float64).cumsum(0).tolist()
    return [SMOOTH.level_of_ratio(5 * math.exp(-place)) for place in places]


@cache
def start_and_end() -> tuple[Tensor, Tensor]:
    """Start and converged end of a probability flow, from the first to the last of `levels_of`."""
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).view(1, 1, 4, 4)
    ends = [SMOOTH.level_of_ratio(5.0), SMOOTH.level_of_ratio(0.1)]
    return x, sample(DATA, rk45(SMOOTH, 1e-11, 1e-11), ends, x, noise=NoiseStreams(0))


def measured_order(name: str) -> float:
    solver = solvers.create(name, SMOOTH)
    x, end = start_and_end()
    errors = []
    for steps in (96, 192):
        got = sample(DATA, solver, levels_of(steps, solver.order), x, noise=NoiseStreams(0))
        errors.append((got - end).abs().max().item())
    return math.log2(errors[0] / errors[1])


def distance(solver: Solver, draws: int, steps: int, denoise: Counted) -> float:
    """Kolmogorov-Smirnov distance of the draws to the data."""
    levels: Sequence[NoiseLevel] = timetable.create("karras", WHERE, steps)
    noise = NoiseStreams(1)
    x = noise.draw((1, 1, draws)).double()
    ends = sample(denoise, solver, levels, x, noise=noise).flatten().sort().values
    share = torch.arange(draws + 1, dtype=torch.float64) / draws
    exact = torch.zeros_like(ends)
    for weight, mean, std in zip(WEIGHTS, MEANS, STDS, strict=True):
        exact += weight * torch.special.ndtr((ends - mean) / std)
    return torch.maximum((exact - share[:-1]).abs().max(), (exact - share[1:]).abs().max()).item()


def draws_noise(solver: Solver) -> bool:
    """Tell whether a solver is stochastic: two runs with different noise differ."""
    levels = timetable.create("karras", WHERE, 4)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    ends = [sample(DATA, solver, levels, x, noise=NoiseStreams(seed)) for seed in (0, 1)]
    return not torch.equal(*ends)


@torch.no_grad()
def row(name: str, line: str, draws: int) -> str:
    solver = solvers.create(name, WHERE)
    adaptive = "adaptive" in line
    measured = "-" if adaptive or draws_noise(solver) else f"{measured_order(name):.2f}"
    denoise, steps = Counted(), 1 if adaptive else 80
    ks = distance(solver, draws, steps, denoise)
    calls = f"{denoise.calls} in all" if adaptive else f"{denoise.calls / steps:.0f}"
    return f"| `{name}` | {line} | {solver.order} | {measured} | {calls} | {ks:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure every solver on a known mixture.")
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--only", nargs="*", choices=solvers.names(), metavar="SOLVER")
    given = parser.parse_args()
    if given.draws < 1:
        parser.error("--draws: at least 1 is needed")
    print(HEAD)
    for name, line in solvers.describe().items():
        if given.only is None or name in given.only:
            print(row(name, line, given.draws), flush=True)
    print(NOTES, end="")


if __name__ == "__main__":
    main()

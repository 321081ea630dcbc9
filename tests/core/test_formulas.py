"""Each deterministic solver against its paper's formula, written straight down in NumPy.

The references share nothing with the library: they divide by alpha, keep their history in lists,
integrate with scipy and, for UniPC, start the corrector from the x before the predictor.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import quad

from latentdiff import solvers
from latentdiff.diffusion import process, sampling
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import mixture
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.solvers import DEIS, GDDIM, Solver, UniPC

Array = NDArray[np.float64]
Network = Callable[[Array, NoiseLevel], Array]
Reference = Callable[[Network, Process, list[NoiseLevel], Array], Array]

DATA = mixture([0.3, 0.7], [[-1.0, 0.5], [1.2, -0.3]], [0.4, 0.6])
RATIOS = (9.0, 5.0, 3.1, 1.8, 1.1, 0.5, 0.25)
SHAPE = (1, 2, 3, 3)


def x0_of(x: Array, level: NoiseLevel) -> Array:
    return DATA(torch.from_numpy(x), level).x0.numpy()


def lam(level: NoiseLevel) -> float:
    return math.log(level.alpha / level.sigma)


def noise_of(network: Network, x: Array, level: NoiseLevel) -> Array:
    return (x - level.alpha * network(x, level)) / level.sigma


def at(where: Process, half_log_snr: float) -> NoiseLevel:
    return where.level(where.t_of_log_snr(2 * half_log_snr))


def euler(f: Network, where: Process, levels: list[NoiseLevel], x: Array) -> Array:
    for a, b in pairwise(levels):
        x = b.alpha * (x / a.alpha + (b.ratio - a.ratio) * noise_of(f, x, a))
    return x


def heun(f: Network, where: Process, levels: list[NoiseLevel], x: Array) -> Array:
    for a, b in pairwise(levels):
        first = noise_of(f, x, a)
        guess = b.alpha * (x / a.alpha + (b.ratio - a.ratio) * first)
        slope = (first + noise_of(f, guess, b)) / 2
        x = b.alpha * (x / a.alpha + (b.ratio - a.ratio) * slope)
    return x


def dpm2(f: Network, where: Process, levels: list[NoiseLevel], x: Array) -> Array:
    """k-diffusion's sample_dpm_2."""
    for a, b in pairwise(levels):
        m = at(where, (lam(a) + lam(b)) / 2)
        middle = m.alpha * (x / a.alpha + (m.ratio - a.ratio) * noise_of(f, x, a))
        x = b.alpha * (x / a.alpha + (b.ratio - a.ratio) * noise_of(f, middle, m))
    return x


def dpm_solver_3(f: Network, where: Process, levels: list[NoiseLevel], x: Array) -> Array:
    """Lu et al. 2022, algorithm 2."""
    for a, b in pairwise(levels):
        h, e = lam(b) - lam(a), math.expm1
        s1, s2 = at(where, lam(a) + h / 3), at(where, lam(a) + 2 * h / 3)
        n0 = noise_of(f, x, a)
        u1 = s1.alpha / a.alpha * x - s1.sigma * e(h / 3) * n0
        d1 = noise_of(f, u1, s1) - n0
        u2 = s2.alpha / a.alpha * x - s2.sigma * e(2 * h / 3) * n0
        u2 = u2 - s2.sigma * 2 * (e(2 * h / 3) / (2 * h / 3) - 1) * d1
        d2 = noise_of(f, u2, s2) - n0
        x = b.alpha / a.alpha * x - b.sigma * e(h) * n0 - b.sigma * 1.5 * (e(h) / h - 1) * d2
    return x


def dpmpp_2s(f: Network, where: Process, levels: list[NoiseLevel], x: Array) -> Array:
    """Lu et al. 2022 (DPM-Solver++), algorithm 1."""
    for a, b in pairwise(levels):
        h = lam(b) - lam(a)
        s = at(where, lam(a) + h / 2)
        u = s.sigma / a.sigma * x - s.alpha * math.expm1(-h / 2) * f(x, a)
        x = b.sigma / a.sigma * x - b.alpha * math.expm1(-h) * f(u, s)
    return x


def dpmpp(order: int) -> Reference:
    """DPM-Solver++(2M), algorithm 2; and the exact integral of the parabola for 3M."""

    def run(f: Network, where: Process, levels: list[NoiseLevel], x: Array) -> Array:
        seen: list[tuple[float, Array]] = []
        for a, b in pairwise(levels):
            seen = [(lam(a), f(x, a)), *seen][:order]
            if len(seen) == 3:
                weights = integrals([place for place, _ in seen], lam(a), lam(b), math.exp)
                x = b.sigma / a.sigma * x
                x = x + b.sigma * sum(
                    w * value for w, (_, value) in zip(weights, seen, strict=True)
                )
                continue
            mean = seen[0][1]
            if len(seen) == 2:
                r = (seen[0][0] - seen[1][0]) / (lam(b) - lam(a))
                mean = (1 + 1 / (2 * r)) * mean - seen[1][1] / (2 * r)
            x = b.sigma / a.sigma * x - b.alpha * math.expm1(lam(a) - lam(b)) * mean
        return x

    return run


def integrals(
    nodes: list[float],
    start: float,
    end: float,
    density: Callable[[float], float],
    variable: Callable[[float], float] = lambda place: place,
) -> list[float]:
    def value(place: float, node: float) -> float:
        factors = [(variable(place) - other) / (node - other) for other in nodes if other != node]
        return math.prod(factors) * density(place)

    return [quad(value, start, end, args=(node,), epsabs=1e-13)[0] for node in nodes]


def deis(order: int, variable: Callable[[Process, float], float]) -> Reference:
    """Zhang & Chen 2023, eq. 15, over rho = sigma / alpha; LMS where the variable is rho."""

    def run(f: Network, where: Process, levels: list[NoiseLevel], x: Array) -> Array:
        seen: list[tuple[float, Array]] = []
        for a, b in pairwise(levels):
            seen = [(variable(where, a.ratio), noise_of(f, x, a)), *seen][:order]
            weights = integrals(
                [place for place, _ in seen],
                a.ratio,
                b.ratio,
                lambda rho: 1.0,
                lambda rho: variable(where, rho),
            )
            total = sum(w * value for w, (_, value) in zip(weights, seen, strict=True))
            x = b.alpha * (x / a.alpha + total)
        return x

    return run


def gddim(degree: int) -> Reference:
    """Zhang, Tao & Chen 2023, predictor and corrector of section 4; R = K = sigma for a scalar."""

    def integrated(
        where: Process, x: Array, a: NoiseLevel, b: NoiseLevel, known: list[tuple[float, Array]]
    ) -> Array:
        def time(rho: float) -> float:
            return where.t_of_log_snr(-2 * math.log(rho))

        nodes = [place for place, _ in known]
        weights = integrals(nodes, a.ratio, b.ratio, lambda rho: 1.0, time)
        total = sum(w * value for w, (_, value) in zip(weights, known, strict=True))
        return b.alpha * (x / a.alpha + total)

    def run(f: Network, where: Process, levels: list[NoiseLevel], x: Array) -> Array:
        seen: list[tuple[float, Array]] = []
        for a, b in pairwise(levels):
            seen = [(a.t, noise_of(f, x, a)), *seen][:degree]
            guess = integrated(where, x, a, b, seen)
            corrected = [(b.t, noise_of(f, guess, b)), *seen][:degree]
            x = integrated(where, x, a, b, corrected)
        return x

    return run


def pseudo(start: str) -> Reference:
    """Liu et al. 2022, eq. 11-13."""

    def phi(x: Array, e: Array, a: NoiseLevel, b: NoiseLevel) -> Array:
        x0 = (x - a.sigma * e) / a.alpha
        return b.alpha * x0 + b.sigma * e

    def run(f: Network, where: Process, levels: list[NoiseLevel], x: Array) -> Array:
        seen: list[Array] = []
        for a, b in pairwise(levels):
            e = noise_of(f, x, a)
            seen = [e, *seen]
            if len(seen) < 4 and start == "pndm":
                m = where.level((a.t + b.t) / 2)
                e2 = noise_of(f, phi(x, e, a, m), m)
                e3 = noise_of(f, phi(x, e2, a, m), m)
                e4 = noise_of(f, phi(x, e3, a, b), b)
                e = (e + 2 * e2 + 2 * e3 + e4) / 6
            elif len(seen) == 1 and start == "plms":
                e = (e + noise_of(f, phi(x, e, a, b), b)) / 2
            elif len(seen) == 2:
                e = (3 * seen[0] - seen[1]) / 2
            elif len(seen) == 3:
                e = (23 * seen[0] - 16 * seen[1] + 5 * seen[2]) / 12
            elif len(seen) >= 4:
                e = (55 * seen[0] - 59 * seen[1] + 37 * seen[2] - 9 * seen[3]) / 24
            x = phi(x, e, a, b)
        return x

    return run


def unipc(degree: int, variant: str) -> Reference:
    """Zhao et al. 2023, algorithms 5-8: the corrector starts again from the x before."""

    def unified(
        a: NoiseLevel, b: NoiseLevel, x: Array, known: Sequence[tuple[float, Array]], power: int
    ) -> Array:
        (place, m0), *others = known
        h = lam(b) - lam(a)
        scale = h if variant == "bh1" else -math.expm1(-h)
        x = b.sigma / a.sigma * x - b.alpha * math.expm1(-h) * m0
        if not others:
            return x
        ratios = np.array([(other - place) / h for other, _ in others])
        if len(others) == 1 and power == 1:
            weights = np.array([0.5])
        else:
            # Integral of e^(u - h) r^k over the step, r in units of h: the moments to be matched.
            moments = [
                quad(lambda u, k=k: math.exp(u - h) * (u / h) ** k, 0, h, epsabs=1e-14)[0]
                for k in range(1, len(others) + 1)
            ]
            matrix = np.array([ratios ** (k - 1) for k in range(1, len(others) + 1)])
            weights = np.linalg.solve(matrix, np.array(moments) / scale)
        change = sum(w * (m - m0) / r for w, r, (_, m) in zip(weights, ratios, others, strict=True))
        return x + b.alpha * scale * change

    def run(f: Network, where: Process, levels: list[NoiseLevel], x: Array) -> Array:
        seen: list[tuple[float, Array]] = []
        before = x
        for index, (a, b) in enumerate(pairwise(levels)):
            m = f(x, a)
            if index:
                previous = levels[index - 1]
                known = [*seen, (lam(a), m)]
                x = unified(previous, a, before, known, len(known) - 1)
            seen = [(lam(a), m), *seen][:degree]
            before = x
            x = unified(a, b, x, seen, len(seen) - 1)
        return x

    return run


REFERENCES: dict[str, Reference] = {
    "ddim": euler,
    "euler": euler,
    "heun": heun,
    "dpm2": dpm2,
    "dpm-solver-1": euler,
    "dpm-solver-2": dpm2,
    "dpm-solver-3": dpm_solver_3,
    "dpmpp-2s": dpmpp_2s,
    "dpmpp-2m": dpmpp(2),
    "dpmpp-3m": dpmpp(3),
    "lms": deis(4, lambda where, rho: rho),
    "deis": deis(3, lambda where, rho: math.log(rho)),
    "deis-2": deis(2, lambda where, rho: math.log(rho)),
    "deis-tab": deis(3, lambda where, rho: where.t_of_log_snr(-2 * math.log(rho))),
    "deis-rhoab": deis(3, lambda where, rho: rho),
    "gddim": gddim(3),
    "pndm": pseudo("pndm"),
    "plms": pseudo("plms"),
    "ipndm": pseudo("ipndm"),
    "unipc": unipc(2, "bh2"),
    "unipc-bh1": unipc(2, "bh1"),
    "unipc-3": unipc(3, "bh2"),
}


@cache
def start() -> Array:
    return torch.randn(
        SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).numpy()


def assert_formula(solver: Solver, reference: Reference, where: Process) -> None:
    levels = [where.level_of_ratio(ratio) for ratio in RATIOS]
    x = start() * where.prior_scale(levels[0])
    expected = reference(x0_of, where, levels, x)
    got = sampling.sample(DATA, solver, levels, torch.from_numpy(x), noise=NoiseStreams(0))
    assert np.abs(got.numpy() - expected).max() <= 1e-9


def test_no_deterministic_solver_is_without_a_formula() -> None:
    """The adaptive ones have `test_adaptive.py`."""
    where = process.create("vp-continuous")
    stochastic = {"ddpm", "euler-a", "dpm2-a", "euler-maruyama", "sa-solver", "tcd", "lcm"}
    stochastic |= {"dpmpp-sde", "dpmpp-2m-sde", "dpmpp-3m-sde"}
    stochastic |= {"pc", "annealed-langevin", "recovery-langevin", "consistency"}
    adaptive = {"rk45", "dpm-adaptive", "sde-adaptive"}
    assert set(solvers.names()) - stochastic - adaptive == set(REFERENCES)
    assert all(solvers.create(name, where).order >= 1 for name in solvers.names())


@pytest.mark.parametrize("kind", ["vp-continuous", "flow"])
@pytest.mark.parametrize("name", REFERENCES)
def test_the_run_is_the_formulas(name: str, kind: str) -> None:
    where = process.create(kind)
    assert_formula(solvers.create(name, where), REFERENCES[name], where)


@pytest.mark.parametrize("order", [1, 4])
def test_other_orders_of_deis(order: int) -> None:
    where = process.create("vp-continuous")
    assert_formula(DEIS(order), deis(order, lambda _, rho: math.log(rho)), where)


@pytest.mark.parametrize("degree", [2, 4])
def test_other_degrees_of_gddim(degree: int) -> None:
    where = process.create("vp-continuous")
    assert_formula(GDDIM(where, degree), gddim(degree), where)


@pytest.mark.parametrize(("degree", "variant"), [(1, "bh1"), (1, "bh2"), (3, "bh1")])
def test_other_degrees_of_unipc(degree: int, variant: str) -> None:
    where = process.create("vp-continuous")
    assert variant in ("bh1", "bh2")
    assert_formula(UniPC(degree, variant), unipc(degree, variant), where)

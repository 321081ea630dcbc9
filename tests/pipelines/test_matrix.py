"""Every solver with every guidance on the bundled model, and one pipeline in eight threads."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff import PAG, SEG, LatentDiffusionPipeline, solvers
from latentdiff.guidance import methods
from latentdiff.solvers import Solver
from latentdiff.solvers.adaptive import Adaptive

GUIDANCES: dict[str, dict[str, Any]] = {
    **{name: {"guidance": name, "guidance_scale": 3.0} for name in methods.names()},
    "cfg++": {"guidance": "cfg++", "guidance_scale": 0.6},
    "rescaled": {"guidance_scale": 3.0, "guidance_rescale": 0.7, "guidance_interval": (0.3, 9.0)},
    "in an interval": {"guidance": "apg", "guidance_scale": 3.0, "guidance_interval": (0.3, 9.0)},
    "further": {"guidance_scale": 1.0, "also": ["a blue sky:0.6"]},
    "threshold": {"guidance_scale": 6.0, "edits": ["threshold:0.9"]},
    "pag": {"guidance_scale": 3.0, "edits": [PAG(2.0)]},
    "seg": {"guidance_scale": 1.0, "edits": [SEG(2.0)]},
}
# Each solver with one guidance by default, all pairs with `pytest -m slow`.
PAIRS = [
    pytest.param(
        solver, guidance, marks=[] if (place + row) % len(GUIDANCES) == 0 else pytest.mark.slow
    )
    for (row, solver), (place, guidance) in product(
        enumerate(solvers.names()), enumerate(GUIDANCES)
    )
]


@cache
def pipeline() -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(device="cpu", dtype="float32")


def draw(prompt: str, seed: int = 0, **settings: Any) -> Tensor:
    """A picture [3, 64, 64] in [0, 1]."""
    given = {"height": 64, "width": 64, "num_inference_steps": 3, "progress": False} | settings
    return pipeline()(prompt, seed=seed, output_type="pt", **given).images[0]


def made(name: str) -> str | Solver:
    """The solver; one that chooses its own steps with a tolerance for a quick look."""
    if "adaptive" not in solvers.describe()[name]:
        return name
    solver = solvers.create(name, pipeline().bundle.process)
    assert isinstance(solver, Adaptive)
    return replace(solver, controller=replace(solver.controller, rtol=1.0, atol=1.0))


@pytest.mark.parametrize(("solver", "guidance"), PAIRS)
def test_every_solver_draws_with_every_guidance(solver: str, guidance: str) -> None:
    """A picture, not of one colour, and another than without guidance."""
    run: dict[str, Any] = {"solver": made(solver), "timetable": "trailing"}
    run["num_inference_steps"] = 2
    guided = draw("a red heart", **run, **GUIDANCES[guidance])
    assert guided.shape == (3, 64, 64)
    assert torch.isfinite(guided).all()
    assert guided.std() > 0.02
    assert (guided - draw("a red heart", **run, guidance_scale=1)).abs().max() > 1e-5


def test_eight_calls_at_once_draw_what_they_draw_one_by_one() -> None:
    """To the last bit, each with its own prompt, solver, guidance and number of steps."""
    names = ["dpmpp-2m", "unipc", "ddpm", "sa-solver", "plms", "pc", "heun", "dpmpp-sde"]
    jobs = [
        {
            "prompt": prompt,
            "seed": seed,
            "solver": solver,
            "num_inference_steps": 2 + seed % 2,
            **GUIDANCES[list(GUIDANCES)[seed % len(GUIDANCES)]],
        }
        for seed, (prompt, solver) in enumerate(
            zip(["a red heart", "a rocket", "a cat", "a slice of pizza"] * 2, names, strict=True)
        )
    ]
    alone = [draw(**job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: draw(**job), jobs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))

"""`latentdiff solvers`, and the scripts that measure and compare them."""

import runpy
from pathlib import Path

import pytest
import torch
from tiny import tiny_bundle

from latentdiff import LatentDiffusionPipeline, solvers
from latentdiff.cli import main
from latentdiff.diffusion import timetable

SCRIPTS = Path(__file__).parents[1] / "pipelines"


def test_every_solver_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solvers"]) == 0
    *lines, empty, last, others = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == solvers.names()
    assert all(20 < len(line) < 100 for line in lines)
    assert empty == ""
    assert last == f"timetables: {' '.join(timetable.names())}"
    assert "'DPM++ 2M Karras'" in others


@pytest.mark.parametrize("name", ["ddim", "dpmpp-sde", "rk45"])
def test_a_row_of_the_report(name: str) -> None:
    """Measured orders are numbers for deterministic solvers alone."""
    row = runpy.run_path(str(SCRIPTS / "measure/solver_orders.py"))["row"]
    cells = row(name, solvers.describe()[name], 2000).split(" | ")
    assert cells[0] == f"| `{name}`"
    if name == "ddim":
        assert float(cells[3]) == pytest.approx(1, abs=0.1)
    else:
        assert cells[3] == "-"
    assert float(cells[5].rstrip(" |")) < 0.05


def test_timetables_are_compared_beside_an_exact_flow() -> None:
    """Twice the steps of a second-order solver quarter the error, or better; karras leads."""
    nearness = runpy.run_path(str(SCRIPTS / "measure/timetables.py"))["gaussian_nearness"]
    karras = [nearness("karras", "dpmpp-2m", steps) for steps in (10, 20, 40)]
    assert karras[0] > nearness("trailing", "dpmpp-2m", 10) + 5
    assert karras[2] > karras[1] + 9 > karras[0] + 18


def test_further_prompts_are_measured_by_the_steps_between_neighbours() -> None:
    """Of a plain, of stripes, and of a picture of three columns, one of which is brighter."""
    module = runpy.run_path(str(SCRIPTS / "measure/further_prompts.py"))
    stripes = (torch.arange(4) % 2).float().expand(1, 3, 4, 4)
    assert module["roughness"](torch.full((2, 3, 5, 5), 0.3)) == 0
    assert module["roughness"](stripes) == 255 / 2  # all steps to the side, none down
    bright = torch.tensor([0.0, 0.2, 0.0]).expand(1, 3, 2, 3)
    assert module["roughness"](bright) == pytest.approx(255 * 4 * 0.2 / 7)
    assert {"scale 4", "weight 0.5"} <= module["SETTINGS"].keys()


def test_solvers_are_compared_on_a_model() -> None:
    """A picture for each solver and number of steps; calls are counted; the plot is drawn."""
    module = runpy.run_path(str(SCRIPTS / "measure/compare_solvers.py"))
    pipe = LatentDiffusionPipeline(tiny_bundle())
    prompts = ["a red heart", "a cat"]
    pictures, points, floor = module["compare"](
        pipe, prompts, ["ddim", "dpm2"], [2, 3, 12], 2.0, 24
    )
    assert len(pictures) == 6
    assert [calls for calls, _ in points["ddim"]] == [2, 3, 12]
    assert [calls for calls, _ in points["dpm2"]] == [3, 5, 23]
    away = [distance for _, distance in points["dpm2"]]
    assert away[0] > away[1] > away[2] > 0
    assert 0 < floor < away[1]
    assert module["labelled"](pictures, ["ddim", "dpm2"], ["2", "3", "12"]).size[0] > 3 * 16
    assert module["plot"](points).size == (900, 600)

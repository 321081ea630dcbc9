"""Each scheduler of diffusers is one of ours, step by step, or docs/schedulers.md says why not."""

from pathlib import Path

import diffusers.schedulers
import pytest
from parity import every_scheduler
from parity.every_scheduler import OTHERS, SAME, largest, page, sa_solver
from schedulers import TOLERANCE

from latentdiff.solvers import SASolver


@pytest.mark.parametrize("name", SAME)
def test_it_is_ours_step_by_step(name: str) -> None:
    assert largest(SAME[name][1]()) < TOLERANCE


def test_every_scheduler_is_in_the_table() -> None:
    theirs = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    assert {name.split()[0] for name in SAME} | set(OTHERS) == theirs


def test_the_page_is_what_its_command_prints() -> None:
    committed = Path(__file__).parents[2] / "docs" / "schedulers.md"
    assert committed.read_text("utf-8") == page()


def test_sa_solver_needs_their_extra_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the same comparison fails: the page's reason is the reason."""
    without = lambda noisy, as_in_code: SASolver(noisy=noisy)  # noqa: E731
    monkeypatch.setattr(every_scheduler, "SASolver", without)
    assert largest(sa_solver()) > TOLERANCE

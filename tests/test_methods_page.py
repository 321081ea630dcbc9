"""docs/methods.md: every file, test, solver, timetable and guide that it names is there; and
what the pages link to.

Its commands run word for word in the slow test of `test_examples.py`.
"""

import ast
import re
from pathlib import Path

import pytest
from scripts import ROOT

from latentdiff import solvers
from latentdiff.diffusion import timetable
from latentdiff.guidance.from_text import check_text

PAGE = (ROOT / "docs/methods.md").read_text("utf-8")
NAMED = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", PAGE)
PLACES = ("", "latentdiff/", "tests/")
LINKING = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("assets/*/README.md")]


def test_every_file_and_every_test_is_there() -> None:
    assert len(NAMED) > 100
    for name, test in NAMED:
        (path,) = [ROOT / place / name for place in PLACES if (ROOT / place / name).is_file()]
        if test:
            tree = ast.parse(path.read_text("utf-8"))
            assert test in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, test


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
    near = [link.partition("#")[0] for link in links if not re.match(r"\w+:|#", link)]
    lost = [link for link in near if not (page.parent / link).exists()]
    assert not lost


def test_every_row_of_a_table_is_whole() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert len(rows) > 40
    for row in rows:
        assert row.count("|") == 6, row
        if not row.startswith(("| method", "|---")):
            _, method, file, held, command, _, _ = (cell.strip() for cell in row.split("|"))
            assert ".py`" in file, row
            assert all((method, held, command)), row


def test_what_its_commands_name_is_there() -> None:
    named = re.findall(r"--(solver|timetable|guide) ([\w:./-]+)", PAGE)
    assert len(named) >= 20
    known = {"solver": solvers.names(), "timetable": timetable.names()}
    for option, value in named:
        if option == "guide":
            check_text(value)
        else:
            assert value in known[option], value

"""Freed memory is kept where a process is our own, and only there."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
from latentdiff.learning.config import RunConfig
from latentdiff.learning.run import Run
Run(RunConfig(out="run"))
"""
COMMAND = """
import sys
from latentdiff.cli import run
sys.argv = ["latentdiff", "--version"]
run()
"""

CHURN = """
import resource, torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(3):  # until the process is as large as it gets
    faults()
print(faults())
"""


def faults(tmp_path: Path, before: str) -> int:
    """Page faults of tensors that come and go, in a process that ran something before."""
    done = subprocess.run(
        [sys.executable, "-c", before + CHURN],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
@pytest.mark.parametrize("own", [TRAIN, COMMAND], ids=["training", "command"])
def test_our_processes_keep_freed_memory(tmp_path: Path, own: str) -> None:
    assert faults(tmp_path, own) * 10 < faults(tmp_path, "import latentdiff")

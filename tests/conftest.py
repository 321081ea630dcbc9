"""Set-up of every test: no network, and as many threads as tiny tensors can use."""

import os
import sys
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before any test
# Handing tiny tensors to a pool costs more than it saves, here and in what the tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# What `latentdiff compile` made for whoever runs the tests is none of theirs.
os.environ["XDG_CACHE_HOME"] = "/nonexistent"

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no core waits for the other at the end."""
    items.sort(
        key=lambda item: (item.path.name != "test_kills.py", "training" not in item.path.parts)
    )


@pytest.fixture(autouse=True, scope="module")
def no_precision_is_left() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first run, and refuses another."""
    yield
    if (accelerate := sys.modules.get("accelerate.state")) is not None:
        accelerate.AcceleratorState._reset_state()

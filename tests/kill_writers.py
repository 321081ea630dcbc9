"""Kill writers of `latentdiff.files` at every line; each target is then the old one or the new one.

    PYTHONPATH=.:tests python tests/kill_writers.py

A child counts the lines of `files.py` and of what it writes here, and kills itself at one of them.
Not for the process of a test runner, which has threads: the child is a fork.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from latentdiff import files

OLD, NEW = b"old" * 999, b"new" * 999


def file(folder: Path) -> None:
    files.write_bytes(folder / "target", NEW, replace=True)


def new_file(folder: Path) -> None:
    with files.writing(folder / "target", replace=False) as stage, stage.open("wb") as opened:
        opened.write(NEW[:99])
        opened.flush()
        opened.write(NEW[99:])


def whole_folder(folder: Path) -> None:
    with files.writing_folder(folder / "target", replace=True) as stage:
        (stage / "a").write_bytes(NEW)
        (stage / "sub").mkdir()
        (stage / "sub/b").write_bytes(NEW)


def new_folder(folder: Path) -> None:
    with files.writing_folder(folder / "target", replace=False) as stage:
        (stage / "a").write_bytes(NEW)
        (stage / "b").write_bytes(NEW)


def numbered(folder: Path) -> None:
    files.write_numbered(folder, "-7.png", NEW)


def old_file(folder: Path) -> None:
    (folder / "target").write_bytes(OLD)


def old_folder(folder: Path) -> None:
    (folder / "target").mkdir()
    (folder / "target/a").write_bytes(OLD)


def nothing(folder: Path) -> None:
    pass


WRITERS: list[tuple[Callable[[Path], None], Callable[[Path], None]]] = [
    *[(file, nothing), (file, old_file), (new_file, nothing)],
    *[(whole_folder, nothing), (whole_folder, old_folder), (new_folder, nothing)],
    (numbered, nothing),
]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every name under a folder, with the bytes of files and the places of links."""
    return {
        str(path.relative_to(folder)): str(path.readlink()).encode()
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def killed(write: Callable[[Path], None], folder: Path, number: int) -> bool:
    """Tell whether a child that kills itself at the `number`th line has come that far."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    count = 0

    def line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return line

    def call(frame: FrameType, event: str, argument: object) -> Any:
        return line if frame.f_code.co_filename in (files.__file__, __file__) else None

    try:
        sys.settrace(call)
        write(folder)
    finally:
        os._exit(0)


def check(write: Callable[[Path], None], before: Callable[[Path], None], root: Path) -> None:
    """Every line of one writer."""
    (wanted := root / "wanted").mkdir()
    before(wanted)
    old = contents(wanted)
    write(wanted)
    new = contents(wanted)
    assert old != new
    ends = {"old": 0, "new": 0}
    number = 0
    while True:
        number += 1
        (folder := root / f"{number}").mkdir()
        before(folder)
        if not killed(write, folder, number):
            break
        files.sweep(folder)
        found = contents(folder)
        assert found in (old, new), (write.__name__, number, found.keys())
        ends["old" if found == old else "new"] += 1
        if found == old:
            write(folder)
            assert contents(folder) == new, (write.__name__, number)
    assert min(ends.values()) > 3, ends
    print(f"{write.__name__} after {before.__name__}: {number - 1} kills, {ends}")


def main() -> None:
    os.fsync = lambda handle: None  # a kill does not lose what the kernel has
    memory = Path("/dev/shm")  # thousands of folders, which a busy disk takes minutes for
    for write, before in WRITERS:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
            check(write, before, Path(name))


if __name__ == "__main__":
    main()

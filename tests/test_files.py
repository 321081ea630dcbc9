"""The one writer of files: kills, full and read-only disks, names that are taken."""

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
from kill_writers import contents

from latentdiff import files
from latentdiff.errors import UserError
from latentdiff.files import (
    make_folder,
    sweep,
    sync,
    write_bytes,
    write_numbered,
    write_scratch,
    write_text,
    writing,
    writing_folder,
)

Write = Callable[[Path], object]


def two_files(path: Path, *, replace: bool = True) -> None:
    with writing_folder(path, replace=replace) as stage:
        (stage / "a").write_text("new")
        (stage / "b").write_bytes(b"new" * 999)


def one_file(path: Path) -> None:
    write_bytes(path, b"new" * 999, replace=True)


def refused(write: Write, path: Path, told: str) -> None:
    """One line that names the target and says `told`; nothing beside it has changed."""
    beside = path.parent if path.parent.is_dir() else path.parent.parent
    before = contents(beside)
    with pytest.raises(UserError, match=told) as caught:
        write(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert ".part" not in str(caught.value)
    assert contents(beside) == before


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses in the middle of a write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_writer_killed_at_any_line_leaves_the_old_or_the_new() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_writers.py"))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kills, ") == 7


@pytest.mark.parametrize("write", [one_file, two_files])
def test_a_full_disk_and_what_else_the_system_says_is_one_line(
    write: Write, tmp_path: Path
) -> None:
    for _ in range(2):  # of nothing, and of what is there already
        for size in (0, 2, 99):
            with files_no_larger_than(size):
                refused(write, tmp_path / "target", "File too large")
        write(tmp_path / "target")
    refused(write, tmp_path / ("x" * 300), "File name too long")
    refused(write, tmp_path / "missing/target", f"there is no folder {tmp_path}/missing")
    (tmp_path / "file").touch()
    refused(write, tmp_path / "file/target", f"there is no folder {tmp_path}/file")


@pytest.mark.parametrize("write", [one_file, two_files])
def test_a_read_only_folder_is_one_line(write: Write) -> None:
    with tempfile.TemporaryDirectory() as name:  # where another user can get to
        Path(name).chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            refused(write, Path(name) / "target", "Permission denied")
        finally:
            if root:
                os.seteuid(0)


def test_what_is_no_file_is_never_replaced_by_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis").touch()
    refused(one_file, tmp_path / "folder", "a folder, not a file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/full")
    for device in (tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(UserError, match="a device or a pipe, not a file"):
            one_file(device)
        with pytest.raises(UserError, match="not a folder"):
            two_files(device)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        two_files(tmp_path / "file")
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_char_device()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_taken_name_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a"
    write_text(target, "old\r\n", replace=False)
    refused(lambda path: write_text(path, "new", replace=False), target, "already exists: choose")
    assert target.read_bytes() == b"old\r\n"
    (tmp_path / "link").symlink_to(target)
    write_text(tmp_path / "link", "new", replace=True)  # the link itself
    assert target.read_bytes() == b"old\r\n"
    assert not (tmp_path / "link").is_symlink()

    folder = tmp_path / "folder"
    folder.mkdir()
    two_files(folder, replace=False)  # an empty one is as good as none
    (folder / "a").write_text("old")
    refused(lambda path: two_files(path, replace=False), folder, "exists and is not empty")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    refused(lambda path: two_files(path, replace=False), tmp_path / "link", "symbolic link")
    two_files(folder)
    assert (folder / "a").read_text() == "new"


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_who_comes_first_keeps_the_name(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a file system without hard links, as many memory cards have."""
    if not links:

        def link(*paths: Path) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", link)

    def second_file(path: Path) -> None:
        with writing(path, replace=False) as stage:
            write_text(path, "first", replace=False)
            stage.write_text("second")

    def second_folder(path: Path) -> None:
        with writing_folder(path, replace=False):
            two_files(path, replace=False)

    with pytest.raises(UserError, match="a already exists"):
        second_file(tmp_path / "a")
    with pytest.raises(UserError, match="b already exists"):
        second_folder(tmp_path / "b")
    assert contents(tmp_path) == {"a": b"first", "b": None, "b/a": b"new", "b/b": b"new" * 999}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UserError])
def test_an_error_of_the_block_passes_and_cleans_up(
    tmp_path: Path, error: type[BaseException]
) -> None:
    write_text(tmp_path / "a", "old", replace=True)
    two_files(tmp_path / "b")
    before = contents(tmp_path)

    def fail(name: str, write: Callable[..., AbstractContextManager[Path]]) -> None:
        with write(tmp_path / name, replace=True) as stage:
            (stage / "x" if stage.is_dir() else stage).write_text("half")
            raise error("no")

    for name, write in (("a", writing), ("b", writing_folder), ("c", writing)):
        with pytest.raises(error, match="no"):
            fail(name, write)
    assert contents(tmp_path) == before


def test_a_failing_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_files(tmp_path / "a")
    before, rename = contents(tmp_path), Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == tmp_path / "a" and self.name == "a":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/a: Input/output error"):
        two_files(tmp_path / "a")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["file", "folder"])
def test_all_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    synced: list[tuple[str, bool]] = []
    target = tmp_path / name

    def note(path: Path) -> None:
        inside = path.is_relative_to(tmp_path) and path != tmp_path
        synced.append((path.name if inside else "parent", target.exists()))
        sync(path)

    monkeypatch.setattr(files, "sync", note)
    (one_file if name == "file" else two_files)(target)
    within = [(name, False)] if name == "file" else [("a", False), ("b", False), (name, False)]
    assert sorted(synced[:-1]) == within
    assert synced[-1] == ("parent", True)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        for write in (writing, writing_folder):
            with write(tmp_path / write.__name__, replace=True) as stage:
                file = stage / "x" if stage.is_dir() else stage
                file.touch(0o600)  # as safetensors does
    finally:
        os.umask(before)
    for file in (tmp_path / "writing", tmp_path / "writing_folder/x"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def leave_half(folder: Path, name: str, token: str = "0a" * 8) -> Path:
    """Leave behind the files of a writer that was killed."""
    hidden = folder / f".{name}.{token}.part"
    hidden.mkdir()
    (hidden / name).write_text("half")
    return hidden


def test_dead_writers_are_swept_up_after_and_living_ones_are_left_alone(tmp_path: Path) -> None:
    leave_half(tmp_path, "a")
    other = leave_half(tmp_path, "b")
    begun, go_on = Event(), Event()

    def slow() -> None:
        with writing(tmp_path / "a", replace=True) as stage:
            stage.write_text("slow")
            begun.set()
            go_on.wait()

    thread = Thread(target=slow, daemon=True)
    thread.start()
    begun.wait()
    write_text(tmp_path / "a", "quick", replace=True)
    sweep(tmp_path, "a")
    assert other.exists()
    sweep(tmp_path)
    (tmp_path / ".mine.part").touch()
    (tmp_path / f".mine.{'0a' * 8}.part").touch()  # a file, which no writer here makes
    sweep(tmp_path)
    hidden = {path.name[:6] for path in tmp_path.glob(".*")}
    assert (tmp_path / "a").read_text() == "quick"
    go_on.set()
    thread.join()
    assert hidden == {".mine.", next(p for p in hidden if p.startswith(".a."))}
    assert (tmp_path / "a").read_text() == "slow"
    assert len(list(tmp_path.glob(".*"))) == 2


def test_a_sweep_that_comes_late_does_not_take_the_next_writers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opened the folder of a writer that then ended; another has one of the same name now."""
    half, flock = leave_half(tmp_path, "a"), fcntl.flock

    def late(handle: int, operation: int) -> None:
        shutil.rmtree(half)
        leave_half(tmp_path, "a")
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    sweep(tmp_path)
    assert (half / "a").read_text() == "half"


def test_a_number_that_was_given_meanwhile_is_not_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing of a folder and the reservation another writer was there and done."""
    make = files._make_locked

    def late(free: Iterable[Path]) -> tuple[Path, int | None]:
        (tmp_path / "00000-1.png").touch()
        return make(free)

    monkeypatch.setattr(files, "_make_locked", late)
    assert write_numbered(tmp_path, "-7.png", b"x").name == "00001-7.png"


def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    hidden = tmp_path / f".a.{'0a' * 8}.part"
    two_files(tmp_path / "a")
    before = contents(tmp_path)
    hidden.mkdir()
    (tmp_path / "a").rename(hidden / "a.old")
    sweep(tmp_path)
    assert contents(tmp_path) == before
    hidden.mkdir()
    (hidden / "a.old").mkdir()
    sweep(tmp_path)  # the new one was there already
    assert contents(tmp_path) == before


@pytest.mark.parametrize("missing", ["no locks", "no fcntl", "no sync"])
def test_a_poorer_file_system_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def refuse(*arguments: object) -> None:
        number = errno.EINVAL if missing == "no sync" else errno.ENOLCK
        raise OSError(number, os.strerror(number))

    if missing == "no fcntl":
        monkeypatch.setattr(files, "fcntl", None)
    elif missing == "no sync":
        monkeypatch.setattr(os, "fsync", refuse)
    else:
        monkeypatch.setattr(fcntl, "flock", refuse)
    half = leave_half(tmp_path, "a")
    for write in (one_file, two_files):
        for _ in range(2):
            write(tmp_path / write.__name__)
    assert write_numbered(tmp_path, "-7.png", b"x").name == "00000-7.png"
    sweep(tmp_path)
    assert half.exists() == (missing != "no sync")  # nothing tells whose it is
    assert len(list(tmp_path.glob(".*"))) == half.exists()


def test_scratch_and_folders(tmp_path: Path) -> None:
    make_folder(tmp_path / "a/b")
    make_folder(tmp_path / "a/b")
    write_scratch(tmp_path / "a/b/c", b"old")
    write_scratch(tmp_path / "a/b/c", b"x" * 99)
    with files_no_larger_than(9), pytest.raises(UserError, match=r"cannot write .*b/c: File too"):
        write_scratch(tmp_path / "a/b/c", b"x" * 99)
    assert not (tmp_path / "a/b/c").exists()
    (tmp_path / "a/b/c").touch()
    for path in (tmp_path / "a/b/c", tmp_path / "a/b/c/d", tmp_path / "a" / ("x" * 300)):
        with pytest.raises(UserError, match=r"^cannot write to .*"):
            make_folder(path)

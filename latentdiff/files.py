"""The one writer of files: whatever happens meanwhile, a target is the old one or the new one.

What is written lies in a hidden folder `.NAME.TOKEN.part` beside its target until it is on the
disk; then a rename gives it its name. An error removes the hidden folder. A kill leaves it there,
but not its writer's lock on it: by that the next writer of the same target, and `sweep`, know it
for a dead one's and remove it.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from latentdiff.errors import UserError

try:
    import fcntl
except ModuleNotFoundError:  # Windows, which can neither lock a folder nor sync one
    fcntl = None

_STAGING = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.part", re.DOTALL)
_RESERVED = re.compile(r"\.(?P<number>\d{5,})\.part")
_RUST = re.compile(r"\(os error (\d+)\)")  # how errors of the system read that Rust passes on


@contextmanager
def writing(path: Path, *, replace: bool) -> Iterator[Path]:
    """Write one file: the block fills the path that it is given, which has the target's name.

    A symbolic link is replaced itself, not the file that it points to.

    Args:
        replace: whether an existing file may be replaced.

    Raises:
        UserError: the file cannot be written; nothing is changed then.
    """
    with _errors_in_one_line(path):
        _check_file(path, replace)
        target = path.absolute()
        with _staging_folder(target) as folder:
            stage = folder / target.name
            yield stage
            _bring_to_disk([stage], folder)
            if replace:
                stage.replace(target)
            else:
                _publish(stage, target)
            sync(target.parent)


@contextmanager
def writing_folder(path: Path, *, replace: bool) -> Iterator[Path]:
    """Write a folder: the block fills the empty one that it is given.

    Args:
        replace: whether a folder that is there already, and all that is in it, may go; an empty one
            may in any case. For a moment there is neither the old one nor the new one; after a kill
            in that moment, the next writer or `sweep` puts the old one back.

    Raises:
        UserError: it cannot be written; then all is as it was.
    """
    with _errors_in_one_line(path):
        _check_folder(path, replace)
        target = path.absolute()
        with _staging_folder(target) as folder:
            stage = folder / target.name
            stage.mkdir()
            yield stage
            _bring_to_disk([*stage.rglob("*"), stage], folder)
            if replace and target.exists():
                target.rename(_old(folder, target))
            stage.rename(target)
            sync(target.parent)


def write_bytes(path: Path, data: bytes, *, replace: bool) -> None:
    """Write one file that holds these bytes; see `writing`."""
    with writing(path, replace=replace) as stage:
        stage.write_bytes(data)


def write_text(path: Path, text: str, *, replace: bool) -> None:
    """Write one UTF-8 file, line ends as they are; see `writing`."""
    write_bytes(path, text.encode(), replace=replace)


def write_json(path: Path, value: object, *, replace: bool) -> None:
    """Write one JSON file, indented by two; see `writing`."""
    write_text(path, json.dumps(value, indent=2) + "\n", replace=replace)


def write_numbered(folder: Path, ending: str, data: bytes) -> Path:
    """Write `00012{ending}`, where 00012 is the folder's next running number; return the path.

    The number is this file's alone, also among processes that write to the folder at the same time:
    the hidden folder is named by the number only and so reserves it.

    Args:
        folder: made where it is missing.
        ending: a hyphen, any text and the suffix, as in "-7.png".

    Raises:
        UserError: the folder or the file cannot be written.
    """
    make_folder(folder)
    with _errors_in_one_line(folder):
        sweep(folder)
        written = re.compile(rf"(?P<number>\d+)-.*{re.escape(Path(ending).suffix)}", re.DOTALL)
        number = max(_numbers(folder, written) | _numbers(folder, _RESERVED), default=-1) + 1
        while True:
            free = (folder / f".{n:05d}.part" for n in count(number))
            with _hidden_folder(free) as hidden:
                number = int(hidden.name.split(".")[1])
                # who had this number when the folder was listed may have written it by now
                if number not in _numbers(folder, written):
                    return _write_hidden(hidden, folder / f"{number:05d}{ending}", data)
            number += 1


def write_scratch(path: Path, data: bytes) -> None:
    """Write a file of use to this process alone, in a folder of its own: neither staged nor synced.

    Raises:
        UserError: it cannot be written; nothing of it stays.
    """
    with _errors_in_one_line(path):
        try:
            path.write_bytes(data)
        except OSError:
            path.unlink(missing_ok=True)
            raise


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder for libraries that can only read and write files; it goes at the end.

    Raises:
        UserError: it cannot be made, or written to.
    """
    try:
        with TemporaryDirectory() as name:
            yield Path(name)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to the folder of temporary files: {reason}") from error


def make_folder(path: Path) -> None:
    """Make a folder and all above it; each is brought to the disk as an entry of its parent.

    Raises:
        UserError: it cannot be made, or something else has its name.
    """
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in made:
            sync(folder.parent)
    except FileExistsError as error:
        raise UserError(f"cannot write to {path}: it is not a folder") from error
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Bring a file, or the list of a folder's entries, to the disk.

    Raises:
        OSError: it cannot be.
    """
    if fcntl is None and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if fcntl is None else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync, such as some shared ones
            raise
    finally:
        os.close(handle)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in a folder; put back a folder that one had moved aside.

    The work of a living writer stays, and so does everything where the file system has no locks.

    Args:
        name: of the only target that is looked at; None for all of them.

    Raises:
        OSError: the folder cannot be listed.
    """
    for hidden in list(folder.iterdir()):
        match = _STAGING.fullmatch(hidden.name)
        reserved = name is None and _RESERVED.fullmatch(hidden.name)
        if reserved or (match and name in (None, match["name"])):
            with suppress(OSError):  # gone meanwhile, of a living writer, or not ours to remove
                lock = _lock(hidden, wait=False)
                try:
                    _clear(hidden)
                finally:
                    os.close(lock)


@contextmanager
def _errors_in_one_line(target: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError):
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # made by another meanwhile
                raise UserError(f"{target} already exists: choose another name") from error
            reason = error.strerror or error
        elif match := _RUST.search(str(error)):  # from safetensors or tokenizers
            reason = os.strerror(int(match[1]))
        else:
            raise
        raise UserError(f"cannot write {target}: {reason}") from error


def _check_file(path: Path, replace: bool) -> None:
    """Check before the work starts that its file can be written without harm at the end."""
    _check_parent(path)
    if not replace and os.path.lexists(path):
        raise UserError(f"{path} already exists: choose another name")
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise UserError(f"cannot write {path}: it is {kind}, not a file")


def _check_folder(path: Path, replace: bool) -> None:
    _check_parent(path)
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"cannot write {path}: it is not a folder")
    if not replace and path.is_symlink():
        raise UserError(f"cannot write {path}: it is a symbolic link")
    if not replace and path.exists() and any(path.iterdir()):
        raise UserError(f"{path} already exists and is not empty: choose another name")


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")


@contextmanager
def _staging_folder(target: Path) -> Iterator[Path]:
    """A new hidden folder beside the target, without those that dead writers of it left there."""
    with suppress(OSError):  # a folder may be written to and yet not be listed
        sweep(target.parent, target.name)
    tokens = iter(lambda: secrets.token_hex(8), "")
    with _hidden_folder(target.parent / f".{target.name}.{t}.part" for t in tokens) as folder:
        yield folder


@contextmanager
def _hidden_folder(free: Iterable[Path]) -> Iterator[Path]:
    """The first of these folders that can be made; locked, and removed at the end."""
    folder, lock = _make_locked(free)
    try:
        yield folder
    finally:
        with suppress(OSError):  # what cannot be put back or removed now, `sweep` will try again
            _clear(folder)
        if lock is not None:
            os.close(lock)


def _make_locked(free: Iterable[Path]) -> tuple[Path, int | None]:
    for folder in free:
        with suppress(FileExistsError):
            while True:  # until no sweep comes between and takes the folder for a dead writer's
                folder.mkdir()
                try:
                    return folder, _lock(folder, wait=True)
                except FileNotFoundError:
                    continue
                except OSError:  # a file system without locks
                    return folder, None
    raise AssertionError


def _lock(folder: Path, *, wait: bool) -> int:
    """Lock a folder until the handle is closed, or its process and the forks of that have ended.

    Raises:
        FileNotFoundError: it is not there, or another one is by now.
        OSError: it cannot be locked, or is locked and nobody waits.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), folder.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    except OSError:
        os.close(handle)
        raise
    return handle


def _old(hidden: Path, target: Path) -> Path:
    """The place of a folder while it is being replaced."""
    return hidden / f"{target.name}.old"


def _clear(hidden: Path) -> None:
    """Remove a hidden folder; if the old one is in it and there is no new one, put that back."""
    if match := _STAGING.fullmatch(hidden.name):
        target = hidden.with_name(match["name"])
        old = _old(hidden, target)
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
    shutil.rmtree(hidden, ignore_errors=True)


def _bring_to_disk(paths: list[Path], beside: Path) -> None:
    """Sync all; files that safetensors let only their owner read get the mode of any new file."""
    mode = beside.stat().st_mode & 0o666
    for path in paths:
        if path.is_file() and not path.stat().st_mode & 0o077:
            path.chmod(mode)
    with ThreadPoolExecutor(16) as pool:  # thousands one by one take minutes on a busy disk
        list(pool.map(sync, paths))


def _publish(stage: Path, target: Path) -> None:
    """Give a file its name, which must be free: a rename would replace what has it."""
    try:
        os.link(stage, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: reserve the name, then rename over it
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        stage.replace(target)


def _write_hidden(hidden: Path, target: Path, data: bytes) -> Path:
    stage = hidden / target.name
    with _errors_in_one_line(target):
        stage.write_bytes(data)
        _bring_to_disk([stage], hidden)
        _publish(stage, target)
        sync(target.parent)
    return target


def _numbers(folder: Path, pattern: re.Pattern[str]) -> set[int]:
    matches = (pattern.fullmatch(entry.name) for entry in folder.iterdir())
    return {int(match["number"]) for match in matches if match}

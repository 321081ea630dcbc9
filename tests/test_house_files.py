"""The house: only `latentdiff/files.py` opens a file for writing, renames or syncs.

Others write where it tells them to: into a path that begins with the name `stage`, which `writing`
or `writing_folder` gave, or `scratch`, which `scratch_folder` gave.
"""

import ast
from collections.abc import Iterator

import pytest
from test_house import PACKAGE, ROOT, SCRIPTS

SOURCES = sorted({*PACKAGE.rglob("*.py"), *SCRIPTS} - {PACKAGE / "files.py"})

ALLOWED = {
    "latentdiff/learning/records.py: self.log.open('a')": "lines are only added; a resumed run "
    "drops one that was cut short",
    "latentdiff/learning/run.py: (self.out / '.lock').open('w')": "it is empty, to be locked",
    "latentdiff/cli/__init__.py: os.open(os.devnull, os.O_WRONLY)": "no file",
    "latentdiff/pictures.py: bare.save(buffer, format='PNG', pnginfo=chunks)": "memory",
}

GIVERS = {"writing", "writing_folder", "writing_model", "scratch_folder"}
STAGED = {"stage", "scratch"}
WRITING_FLAGS = {"O_WRONLY", "O_RDWR", "O_CREAT", "O_APPEND", "O_TRUNC"}
OPENERS = {"io", "tarfile", "gzip", "bz2", "lzma", "zipfile", "codecs", "Image"}
# By name: which argument is the path, or -1 for what the method belongs to.
WRITERS = {
    "write_text": -1,
    "write_bytes": -1,
    "touch": -1,
    "save_pretrained": 0,
    "save_config": 0,
    "save_file": 1,
    "copy": 1,
    "copy2": 1,
    "copyfile": 1,
    "copytree": 1,
    "savez": 0,
    "savetxt": 0,
    "tofile": 0,
}
RENAMES = {"rename", "renames", "hardlink_to", "symlink_to", "link", "symlink", "move"}
SYNCS = {"fsync", "fdatasync", "sync", "truncate"}
TEMPORARY = {"mkstemp", "NamedTemporaryFile"}
# What saves through `latentdiff.files` itself; any other `x.save(path)` is a library's.
OWN_SAVERS = {"result", "bundle", "run", "task", "clip", "Classifier", "sd1"}


def last_name(node: ast.expr) -> str:
    """The name by which an expression is called or read: `c` of `a.b.c` and of `a.b.c(d)`."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def root(node: ast.expr | None) -> str:
    """The name that a path begins with: `stage` of `str(stage.with_name("a") / "b")`."""
    match node:
        case ast.Name():
            return node.id
        case ast.BinOp():
            return root(node.left)
        case ast.Attribute():
            return root(node.value)
        case ast.Call(func=ast.Name(id="str" | "Path"), args=[first, *_]):
            return root(first)
        case ast.Call(func=ast.Attribute() as method):
            return root(method.value)
        case _:
            return ""


def argument(call: ast.Call, place: int, name: str = "") -> ast.expr | None:
    named = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return call.args[place] if place < len(call.args) else named[0] if named else None


def opened(call: ast.Call) -> ast.expr | None:
    """The path that a call opens for writing, if it does."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    if last_name(call.func) != "open" or argument(call, 9, "fileobj") is not None:
        return None
    if owner is not None and last_name(owner) == "os":
        flags = {last_name(node) for node in ast.walk(call) if isinstance(node, ast.Attribute)}
        return call.args[0] if flags & WRITING_FLAGS else None
    method = owner is not None and last_name(owner) not in OPENERS
    mode = argument(call, 0 if method else 1, "mode")
    if mode is None or (isinstance(mode, ast.Constant) and not set(str(mode.value)) & set("wax+")):
        return None
    return owner if method else call.args[0]


def written(call: ast.Call) -> ast.expr | None:
    """The path that a call writes to, if it does."""
    name = last_name(call.func)
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    if name in WRITERS:
        if name == "copy" and (owner is None or last_name(owner) != "shutil"):
            return None
        return owner if WRITERS[name] < 0 else argument(call, WRITERS[name])
    if name == "save" and owner is not None and last_name(owner) not in OWN_SAVERS:
        return argument(call, 0)
    return opened(call)


def renames_or_syncs(call: ast.Call) -> bool:
    name = last_name(call.func)
    owner = last_name(call.func.value) if isinstance(call.func, ast.Attribute) else None
    of_path = name == "replace" and owner is not None and len(call.args) == 1 and not call.keywords
    of_os = owner == "os" and name in {"replace", *SYNCS}
    return of_path or of_os or (owner is not None and name in RENAMES) or name in TEMPORARY


def own_ways(source: str) -> Iterator[str]:
    """The calls of a source that write without `latentdiff.files`."""
    nodes = list(ast.walk(ast.parse(source)))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    roots = {call: root(path) for call in calls if (path := written(call)) is not None}
    for call in calls:
        if renames_or_syncs(call) or (call in roots and roots[call] not in STAGED):
            yield ast.unparse(call)
    given = {
        node.optional_vars
        for node in nodes
        if isinstance(node, ast.withitem) and last_name(node.context_expr) in GIVERS
    }
    names = [node for node in nodes if isinstance(node, ast.Name)]
    for name in names:
        bound = isinstance(name.ctx, ast.Store) and name not in given
        if bound and name.id in STAGED & set(roots.values()):
            yield f"{name.id}: not from files.py"


def test_only_files_py_writes() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {way}"
        for path in SOURCES
        for way in own_ways(path.read_text("utf-8"))
    }
    assert found == set(ALLOWED), "write through latentdiff/files.py, or say in ALLOWED why not"


@pytest.mark.parametrize(
    "way",
    [
        *["open(path, 'w')", "open(path, mode='ab')", "path.open('x')", "path.open(mode)"],
        *["os.open(path, os.O_WRONLY | os.O_CREAT)", "tarfile.open(path, 'w')", "path.touch()"],
        *["path.write_text('x')", "(folder / 'a').write_bytes(b'x')", "os.replace(a, b)"],
        *["a.rename(b)", "a.replace(b)", "os.link(a, b)", "os.fsync(handle)", "shutil.move(a, b)"],
        *["shutil.copyfile(a, b)", "save_file(values, path)", "model.save_pretrained(folder)"],
        *["picture.save(path)", "torch.save(x, path)", "tempfile.NamedTemporaryFile()"],
        *["np.save(path, x)", "vae.save_config(folder / 'vae')"],
    ],
)
def test_a_way_around_files_py_is_seen(way: str) -> None:
    assert list(own_ways(way)) == [way]


@pytest.mark.parametrize(
    "way",
    [
        *["path.open('rb')", "open(path)", "example.open()", "os.open(path, os.O_RDONLY)"],
        *["text.replace('a', 'b')", "replace(bundle, text=tower)", "tensors.copy()"],
        "tarfile.open(fileobj=buffer, mode='w')",
        "with writing(path, replace=True) as stage:\n    stage.write_text('x')",
        "with files.writing_folder(path, replace=True) as stage:\n    x.save(str(stage / 'a'))",
        "def fill(stage: Path) -> None:\n    save_file({}, stage.with_name('b') / 'c')",
        "bundle.save(path)",
    ],
)
def test_what_goes_through_files_py_or_writes_nothing_passes(way: str) -> None:
    assert not list(own_ways(way))


@pytest.mark.parametrize("way", ["stage = Path('a')", "with open_it() as stage:\n    pass"])
def test_a_stage_of_ones_own_making_is_seen(way: str) -> None:
    assert list(own_ways(f"{way}\nstage.write_text('x')")) == ["stage: not from files.py"]
    assert not list(own_ways(way))  # the name alone may mean anything

"""The house: imports run one way, everything starts, nothing unpickles, the wheel is whole."""

import ast
import importlib
import json
import os
import pkgutil
import runpy
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import latentdiff

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "latentdiff"
SCRIPTS = sorted([*(ROOT / "pipelines").rglob("*.py"), *(ROOT / "training").rglob("*.py")])
SOURCES = sorted([*PACKAGE.rglob("*.py"), *SCRIPTS, *(ROOT / "tests").rglob("*.py")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

# Floors of the house, ground floor first. A module imports from its own package and from floors
# below, never sideways: so no solver knows an edit, and learning knows no pipeline.
FLOORS: list[set[str]] = [
    {"errors", "memory", "random_numbers", "version"},
    {"files", "picture_formats", "reading", "registry"},
    {"pictures"},
    {"diffusion"},
    {"solvers", "models"},
    {"editing", "formats"},
    {"bundle"},
    {"lora", "guidance"},
    {"data"},
    {"pipeline"},
    {"learning", "metrics", "server"},
    {"cli"},
    {"__main__"},
]


def modules() -> list[str]:
    return [m.name for m in pkgutil.walk_packages(latentdiff.__path__, "latentdiff.")]


def floor_of(room: str) -> int:
    for height, rooms in enumerate(FLOORS):
        if room in rooms:
            return height
    raise AssertionError(f"latentdiff/{room} has no floor yet: give it one in FLOORS")


def imported(path: Path) -> Iterator[str]:
    """Every module name that a file imports, inside functions and TYPE_CHECKING too.

    `from latentdiff import pictures` counts as an import of that room; of a name that is no room,
    as one of the front door.
    """
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import hides its floor"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module != "latentdiff" or not all(room_of(name) for name in names):
                yield f"{node.module}"
            yield from names


def room_of(module: str) -> str | None:
    """`latentdiff.solvers.euler` -> `solvers`; None for what is no module or package of ours."""
    parts = module.split(".")
    if len(parts) < 2 or parts[0] != "latentdiff":
        return None
    found = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()
    return parts[1] if found else None


def test_imports_run_one_way() -> None:
    wrong: list[str] = []
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE)
        if inside == Path("__init__.py"):  # the front door shows what is upstairs
            continue
        here = inside.with_suffix("").parts[0]
        for module in imported(path):
            there = room_of(module)
            if module == "latentdiff":
                wrong.append(f"{inside} imports the front door, and with it every room")
            elif there not in (None, here) and floor_of(there) >= floor_of(here):
                wrong.append(f"{inside} imports {module}")
    assert not wrong, "\n".join(sorted(set(wrong)))


@pytest.mark.parametrize("page", ["docs/design.md", "CONTRIBUTING.md"])
def test_the_pages_tell_the_floors(page: str) -> None:
    text = " ".join((ROOT / page).read_text("utf-8").replace("←", "<-").split())
    told = text[text.index("errors, memory") :].partition("`")[0].split(" <- ")
    assert [set(floor.strip().split(", ")) for floor in told] == FLOORS


def test_the_package_never_imports_the_script_folders() -> None:
    for path in PACKAGE.rglob("*.py"):
        roots = {module.split(".")[0] for module in imported(path)}
        assert not roots & {"pipelines", "training", "tests", "tiny"}, path


def test_every_module_imports() -> None:
    for name in modules():
        importlib.import_module(name)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: f"{p.relative_to(ROOT)}")
def test_every_script_starts_from_any_folder(
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As `python path/to/script.py --help`, in this process, which has the libraries loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert not stopped.value.code
    assert "usage:" in capsys.readouterr().out.lower()
    assert "[default: " not in script.read_text()  # taken for markup, and left out of the help
    assert not list(tmp_path.iterdir())


def test_no_script_shadows_a_library() -> None:
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    assert SCRIPTS
    assert not {script.stem for script in SCRIPTS} & taken
    assert not list(ROOT.glob("pipelines/**/__init__.py")) + list(
        ROOT.glob("training/**/__init__.py")
    )


def test_console_script_starts() -> None:
    """Run the script that the installer writes for each entry of [project.scripts]."""
    assert PROJECT["scripts"]
    for target in PROJECT["scripts"].values():
        module, function = target.split(":")
        code = f"import sys; from {module} import {function}; sys.exit({function}())"
        done = python("-c", code, "--version")
        assert (done.returncode, done.stderr) == (0, "")
        assert latentdiff.__version__ in done.stdout


def test_start_up_is_light(tmp_path: Path) -> None:
    """Neither `import latentdiff` nor any `--help` nor a list waits for torch; and to draw with the
    bundled model, nothing waits for diffusers, transformers and what these bring along."""
    report = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    code = "import latentdiff; from latentdiff.cli import main; main(['generate', '--help'])"
    done = python("-c", f"{code}; {report}")
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not {"torch", "numpy", "PIL", "diffusers", "transformers"} & loaded
    done = python("-c", f"from latentdiff.cli import main; main(['solvers']); {report}")
    assert "torch" not in set(json.loads(done.stdout.splitlines()[-1]))

    draw = f"main(['generate', 'a red heart', '--steps', '1', '--out', {str(tmp_path)!r}])"
    done = python("-c", f"from latentdiff.cli import main; {draw}; {report}")
    assert len(list(tmp_path.glob("*.png"))) == 1, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    heavy = {"diffusers", "transformers", "scipy", "peft", "accelerate", "huggingface_hub"}
    heavy |= {"torch._dynamo", "torch._inductor", "sympy"}
    assert "torch" in loaded
    assert not heavy & loaded


def test_nothing_unpickles_and_nothing_runs_remote_code() -> None:
    wrong: list[str] = []
    for path in SOURCES:
        roots = {module.split(".")[0] for module in imported(path)}
        banned = roots & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "torchvision"}
        if not path.is_relative_to(ROOT / "tests"):  # tests make files that must be refused
            wrong += [f"{path.name} imports {name}" for name in banned]
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "trust_remote_code"}:
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    wrong.append(f"{path.name}:{node.value.lineno} {node.arg}")
            elif isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "th.load"}:
                wrong.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert not wrong, wrong


def test_no_global_randomness_in_the_library() -> None:
    """Random draws name their generator; the seeds of the process are never touched."""
    draws = {"rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli"}
    global_state = {"manual_seed", "seed", "set_rng_state", "rand_like", "randn_like"}
    wrong: list[str] = []
    for path in PACKAGE.rglob("*.py"):
        assert "random" not in set(imported(path)), path
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            owner, _, last = name.rpartition(".")
            named = any(k.arg == "generator" for k in call.keywords)
            if (owner == "torch" and (last in global_state or (last in draws and not named))) or (
                owner in {"np.random", "numpy.random"}
                and last not in {"default_rng", "Generator", "SeedSequence", "Philox", "PCG64"}
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno} {name}")
    assert not wrong, wrong


def test_an_editable_install_finds_the_package(tmp_path: Path) -> None:
    """What `pip install -e .` builds: a line with the path of this checkout."""
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["editable"]))
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".pth")]
        assert archive.read(name).decode().split() == [str(ROOT)]


def test_wheel_holds_the_package_and_the_bundled_model_only() -> None:
    builder = WheelBuilder(str(ROOT))
    files = list(builder.recurse_included_files())
    inside = {file.distribution_path for file in files}
    assert inside
    assert all(name.startswith("latentdiff/") for name in inside)
    expected = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py")}
    expected |= {"latentdiff/py.typed", "latentdiff/assets/README.md"}
    expected |= {f"latentdiff/assets/clip/tokenizer/{n}" for n in ("vocab.json", "merges.txt")}
    commands = ("autoencoder", "diffusion", "distill", "finetune")
    scripts = {f"latentdiff/training/{n}.py" for n in commands}
    assert {name for name in inside if name.startswith("latentdiff/training/")} == scripts
    expected |= {
        f"latentdiff/{p.relative_to(ROOT).as_posix()}"
        for p in (ROOT / "assets").rglob("*.safetensors")
    }
    assert expected <= inside, expected - inside
    assert sum(Path(file.path).stat().st_size for file in files) < 95e6


def test_constraints_pin_every_dependency_portably() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(pin.url is None and str(pin.specifier).startswith("==") for pin in pins)
    assert not [pin for pin in pins if "+" in str(pin.specifier)]  # no +cpu: not on PyPI
    pinned = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    assert "torchvision" not in pinned

    extras = PROJECT["optional-dependencies"]
    wanted = [Requirement(r) for r in (*PROJECT["dependencies"], *extras["train"], *extras["test"])]
    for requirement in wanted:
        if canonicalize_name(requirement.name) != "latentdiff":
            version = pinned.get(canonicalize_name(requirement.name))
            assert version, f"{requirement.name} is not pinned in constraints.txt"
            assert requirement.specifier.contains(version), requirement


def test_ci_walks_the_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    for install in ("-c constraints.txt -e .", "-c constraints.txt -e '.[test]'"):
        assert f"pip install {install}" in readme
        assert f"pip install --quiet {install}" in ci
    assert 'latentdiff generate "a red heart"' in readme
    assert 'latentdiff generate "a red heart"' in ci


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run this interpreter on the checkout, with no network."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )

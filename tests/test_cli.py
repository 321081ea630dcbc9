"""The command line, on a real tiny model: what it writes, says and refuses."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_bundle, tower_of, unet_of, vae_of

from latentdiff import LatentDiffusionPipeline, solvers
from latentdiff.cli import main
from latentdiff.cli.generate import generate
from latentdiff.diffusion import timetable
from latentdiff.pipeline import Request, Run, arguments


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle().save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "pictures"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def record(path: Path) -> dict[str, object]:
    return json.loads(Image.open(path).info["latentdiff"])


def chunks(path: Path) -> set[bytes]:
    data, kinds, at = path.read_bytes(), set[bytes](), 8
    while at < len(data):
        kinds.add(data[at + 4 : at + 8])
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return kinds


def draw(model: Path, out: Path, *arguments: str) -> list[Path]:
    """Run `generate` with few steps, and return its new pictures in their order."""
    before = set(out.glob("*.png")) if out.exists() else set[Path]()
    given = ["generate", *arguments, "--model", str(model), "--out", str(out)]
    if "--steps" not in arguments:
        given += ["--steps", "2"]
    assert main(given) == 0
    return sorted(set(out.glob("*.png")) - before)


def test_numbered_pictures_a_grid_and_nothing_overwritten(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = draw(model, out, "a red heart", "a cat", "-n", "2", "--seed", "7", "--grid")
    names = ["00000-7-grid", "00000-7", "00001-7", "00002-7", "00003-7"]
    assert [path.stem for path in drawn] == names
    said = capsys.readouterr()
    assert sorted(said.out.split()) == sorted(map(str, drawn))
    assert said.err == "seed 7\n"

    grid, *pictures = drawn
    rows = [np.concatenate([pixels(p) for p in pictures[i : i + 2]], axis=1) for i in (0, 2)]
    assert (pixels(grid) == np.concatenate(rows)).all()

    kept = {path: path.read_bytes() for path in drawn}
    again = draw(model, out, "a red heart", "--seed", "7")
    assert [path.name for path in again] == ["00004-7.png"]
    assert {path: path.read_bytes() for path in drawn} == kept


def test_a_picture_is_the_pipelines_and_its_text_draws_it_again(model: Path, out: Path) -> None:
    # fmt: off
    drawn = draw(
        model, out, "a red heart", "ein Herz ♥", "-n", "2", "--seed", "7", "--steps", "3",
        "--guidance-scale", "2.5", "--rescale", "0.5", "--negative", "blue", "--solver", "euler-a",
        "--timetable", "karras", "--guide", "seg:2", "--guide", "pag:1",
        "--also", "a hat:0.7", "--also", "rain:-0.5", "--weights",
    )
    # fmt: on
    last = record(drawn[3])
    assert (last["prompt"], last["seed"], last["index"]) == ("ein Herz ♥", 7, 3)

    assert last.pop("model") == model.name  # the last part of its path
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    assert last.pop("engine") == "eager"
    del last["version"], last["dtype"]
    arguments = {key: value for key, value in last.items() if key != "index"}
    same = pipe(**arguments, first=last["index"], progress=False).images[0]  # pyright: ignore[reportArgumentType]
    assert abs(np.asarray(same).astype(int) - pixels(drawn[3])).max() <= 1

    (again,) = draw(model, out, "a red heart", "--seed", "7", "--first", "1")
    (other,) = draw(model, out, "a red heart", "--seed", "7")
    _, plain = draw(model, out, "a red heart", "--seed", "7", "-n", "2")
    assert abs(pixels(again) - pixels(plain)).max() <= 1
    assert (pixels(other) != pixels(plain)).any()


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("--steps 3", "num_inference_steps", 3),
        ("--guidance apg", "guidance", "apg"),
        ("--guidance-scale 9", "guidance_scale", 9.0),
        ("--rescale 1", "guidance_rescale", 1.0),
        ("--guide pag:3", "edits", ["pag:3"]),
        ("--guide threshold:0.5", "edits", ["threshold:0.5"]),
        ("--interval 0.5,3", "guidance_interval", [0.5, 3.0]),
        ("--negative blue", "negative_prompt", "blue"),
        ("--also blue:-0.5", "also", ["blue:-0.5"]),
        ("--solver ddpm", "solver", "ddpm"),
        ("--timetable exponential", "timetable", "exponential"),
        ("--dtype bfloat16", "dtype", "bfloat16"),
        ("--seed 8", "seed", 8),
        ("--first 1", "index", 1),
    ],
)
def test_every_option_reaches_the_run(
    model: Path, out: Path, option: str, key: str, value: object
) -> None:
    (plain,) = draw(model, out, "a red heart", "--seed", "7")
    (changed,) = draw(model, out, "a red heart", *["--seed", "7"], *option.split())
    assert record(changed)[key] == value != record(plain).get(key)
    assert (pixels(changed) != pixels(plain)).any()


def test_what_is_recorded_names_no_private_folder_and_the_engine_that_drew(
    model: Path, out: Path
) -> None:
    guide = f"autoguidance:1.5:{model}"
    (drawn,) = draw(model, out, "a cat", "--guide", guide, "--engine", "packed", "--seed", "1")
    told = record(drawn)
    assert (told["edits"], told["engine"]) == (["autoguidance:1.5:tiny"], "packed")
    assert f"{model.parent}" not in drawn.read_bytes().decode("latin-1")
    *_, many = draw(model, out, "a cat", "-n", "3", "--steps", "20", "--seed", "1")
    assert record(many)["engine"] == "packed"  # of three pictures of 20 steps


def test_sizes(model: Path, out: Path) -> None:
    for options, size in (
        ("--width 32 --height 48", (32, 48)),
        ("--size 32", (32, 32)),
        ("--height 48", (16, 48)),
    ):
        (path,) = draw(model, out, "a cat", *options.split())
        assert Image.open(path).size == size
        assert (record(path)["width"], record(path)["height"]) == size


def test_pictures_are_saved_as_they_come(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 pictures of 16 x 16 are drawn at once on a CPU: a run that dies later has saved them."""
    prepare, made = LatentDiffusionPipeline.prepare, list[int]()

    def once(self: LatentDiffusionPipeline, request: Request) -> Run:
        if made:
            raise KeyboardInterrupt
        made.append(len(request.prompt or ()))
        return prepare(self, request)

    monkeypatch.setattr(LatentDiffusionPipeline, "prepare", once)
    arguments = ["-n", "300", "--seed", "7", "--model", str(model), "--out", str(out)]
    assert main(["generate", "a cat", *arguments, "--steps", "1"]) == 130
    assert len(list(out.glob("*.png"))) == made[0] == 128


def test_no_metadata_leaves_pixels_only(model: Path, out: Path) -> None:
    arguments = ["a cat", "--seed", "7", "--grid"]
    assert all(b"tEXt" in chunks(path) for path in draw(model, out, *arguments))
    for path in draw(model, out, *arguments, "--no-metadata"):
        assert chunks(path) == {b"IHDR", b"IDAT", b"IEND"}


def test_a_random_seed_is_printed(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds: list[str] = []
    for _ in range(2):
        (path,) = draw(model, out, "a cat")
        seeds.append(path.stem.split("-")[1])
        assert capsys.readouterr().err == f"seed {seeds[-1]}\n"
    assert seeds[0] != seeds[1]


def test_a_prompt_beyond_the_window_is_reported_in_a_line(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(model, out, "a red heart " * 200, "-n", "2", "--seed", "7")
    warning, seed = sorted(capsys.readouterr().err.splitlines(), reverse=True)
    assert warning.startswith("warning: the prompt")
    assert "window" in warning
    assert seed == "seed 7"


REFUSED = {
    "empty prompt": (["  "], "empty"),
    "one empty prompt of two": (["a cat", ""], "empty"),
    "no prompt": ([], "PROMPT"),
    "huge prompt": (["cat " * 10_000], "10,000"),
    "no steps": (["a cat", "--steps", "0"], "--steps"),
    "too many steps": (["a cat", "--steps", "10000"], "--steps"),
    "no pictures": (["a cat", "-n", "0"], "--number"),
    "negative seed": (["a cat", "--seed", "-2"], "--seed"),
    "wide seed": (["a cat", "--seed", str(2**64)], "--seed"),
    "size off the grid": (["a cat", "--size", "33"], "multiple of"),
    "huge size": (["a cat", "--size", "1000000"], "4096"),
    "size and a side": (["a cat", "--size", "32", "--width", "48"], "--height and --width"),
    "infinite guidance": (["a cat", "--guidance-scale", "inf"], "finite"),
    "unknown guide": (["a cat", "--guide", "pagg:1"], "did you mean 'pag'"),
    "empty further prompt": (["a cat", "--also", ":2"], "also: it is empty"),
    "huge weight": (["a (cat:99)", "--weights"], "between -10 and 10"),
    "guide without scale": (["a cat", "--guide", "pag"], "a guide reads"),
    "unknown solver": (["a cat", "--solver", "eulr"], "did you mean 'euler'"),
    "unknown timetable": (["a cat", "--timetable", "zzz"], "karras"),
    "a weight with a comma": (["a cat", "--also", "a hat:0,7"], "'a hat:0.7' is meant"),
    "a device without numbers": (["a cat", "--device", "meta"], "holds no numbers"),
    "unknown dtype": (["a cat", "--dtype", "int8"], "bfloat16"),
    "unknown device": (["a cat", "--device", "quantum"], "quantum"),
    "unknown option": (["a cat", "--colour", "red"], "--colour"),
    "a place too far": (["a", "--region", f"b@box:1,1,{'9' * 5000},2"], "a box is x0,y0,x1,y1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_nothing_is_written(
    case: str, model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, named = REFUSED[case]
    refused(["generate", *arguments, "--model", str(model), "--out", str(out)], named, capsys)
    assert not out.parent.exists()


MISTAKEN = {
    "generate a --solver eulr": "did you mean 'euler'",
    "generate a --solver dpmpp_2s_ancestral_karras": "unknown solver",
    "generate a --solver dpmpp_2m_karras --timetable beta": "leave one of them out",
    "generate a --timetable karas": "did you mean 'karras'",
    "generate a --guidance cfgpp": "unknown guidance",
    "generate a --guidance cfg++ --guidance-scale 4": "between 0 and 1",
    "generate a --guide pagg:1": "did you mean 'pag'",
    "generate a --guide clip:1:missing": "missing: no such folder of a clip",
    "generate a --lora missing.safetensors:0.5": "missing.safetensors: no such LoRA file",
    "generate a --embedding missing.safetensors": "missing.safetensors: no such file of learned",
    "generate a --vae missing": "missing: no such autoencoder",
    "generate a --prediction epsilonn": "unknown prediction",
    "generate a --vae ~no-such-user/vae": "there is no user of that name",
    f"generate a --syntax a1111 --lora-dir {'x' * 300}": "no folder of LoRAs (",
    f"inpaint picture.png a --mask box:1,1,{'9' * 5000},2": "a box is x0,y0,x1,y1",
    f"interpolate {'x' * 300} b": "nowhere",
    "edit picture.png a --mask missing.png": "missing.png",
    "inpaint picture.png a --mask box:1,2": "box",
    "interpolate a b --lora missing.safetensors": "no such LoRA file",
    "interpolate a b": "nowhere",
}


@pytest.mark.parametrize("line", MISTAKEN)
def test_mistaken_names_are_told_before_anything_is_loaded(
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model is missing, too, and is not what the line is about, but for the last."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("picture.png")
    refused([*line.split(), "--model", "nowhere"], MISTAKEN[line], capsys)


def test_names_of_other_tools_and_fresh_seeds(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (named,) = draw(model, out, "a red heart", "--seed", "7", "--solver", "dpmpp_2m_karras")
    assert (record(named)["solver"], record(named)["timetable"]) == ("dpmpp-2m", "karras")
    own = draw(model, out, "a red heart", "--seed", "7", "--timetable", "Karras")
    assert (pixels(named) == pixels(own[0])).all()
    capsys.readouterr()
    (one,) = draw(model, out, "a red heart", "--seed", "-1", "--guidance", "cfg++")
    (other,) = draw(model, out, "a red heart", "--seed", "-1")
    seeds = [record(path)["seed"] for path in (one, other)]
    assert capsys.readouterr().err.split() == ["seed", str(seeds[0]), "seed", str(seeds[1])]
    assert seeds[0] != seeds[1]
    assert record(one)["guidance_scale"] == 0.6


def test_bad_models(
    model: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x04N.")
    (tmp_path / "empty").mkdir()
    cut = Path(shutil.copytree(model, tmp_path / "cut"))
    (weights,) = (cut / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    legacy = Path(shutil.copytree(model, tmp_path / "legacy"))
    (weights,) = (legacy / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))

    cases = {
        tmp_path / "nowhere": "nowhere",
        tmp_path / "empty": "model_index.json",
        cut: "damaged",
        pickle: "pickle",
        legacy: "pickle",
    }
    for path, named in cases.items():
        arguments = ["generate", "a cat", "--model", str(path), "--out", str(out)]
        refused(arguments, named, capsys)
        refused(["info", str(path)], named, capsys)
    for command in (["info"], ["convert"], ["generate", "a", "--lora"]):
        ending = [str(out)] if command == ["convert"] else []
        refused([*command, "~no-such-user/model", *ending], "no user of that name", capsys)
    assert not out.parent.exists()


def test_unwritable_output(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "below", Path("/proc/latentdiff"), tmp_path / ("x" * 300)):
        arguments = ["generate", "a cat", "--steps", "1", "--model", str(model), "--out", str(out)]
        refused(arguments, "cannot write", capsys)
    assert file.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [file]


def refused(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert said.out == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_output_is_one_line(unbuffered: str) -> None:
    command = "import sys; from latentdiff.cli import run; sys.exit(run())"
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", command, "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    told = "error: cannot write: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (2, told)


SHORT_OF_MEMORY = """
import json, resource, sys
from pathlib import Path
from latentdiff.cli import main

first, *rest = json.loads(sys.argv[1])
assert main(first[1]) == 0  # so that all libraries are loaded
for more, arguments in rest:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    assert main(arguments) == 2
"""


@pytest.mark.skipif(sys.platform != "linux", reason="its limit and /proc")
def test_too_little_memory_is_one_line(model: Path, tmp_path: Path) -> None:
    for size in (32, 7000):
        Image.new("RGB", (size, size)).save(tmp_path / f"{size}.png", compress_level=1)
    rest = ["a disc", "--steps", "1", "--seed", "0", "--model", str(model)]
    commands = [
        (0, ["edit", "32.png", *rest, "--strength", "1"]),
        (32, ["edit", "32.png", *rest]),  # the file is read into a buffer of 64 MiB
        (128, ["edit", "7000.png", *rest]),  # 187 MiB
        (128, ["generate", *rest, "--size", "4096"]),  # by torch
    ]
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, json.dumps(commands)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    told = "error: too little memory for this: fewer or smaller pictures"
    opening = "error: too little memory to open 7000.png: make it smaller"
    assert done.stderr.splitlines()[-3:] == [told, opening, told]


def test_info_counts_what_is_there(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model)]) == 0
    bundle = LatentDiffusionPipeline.from_pretrained(model).bundle
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    for part in (vae_of(bundle), unet_of(bundle), tower_of(bundle).model):
        count = sum(p.numel() for p in part.parameters())
        assert f"{type(part).__name__}, {count / 1e6:.2f} M parameters" in said.values()
    assert said["prediction"] == bundle.prediction
    assert said["window"] == f"{tower_of(bundle).window} tokens"
    assert said["size"].startswith("{} x {} pixels".format(*bundle.size))
    assert said["process"].startswith("vp-scaled-linear")
    assert said["solvers"].split() == solvers.names()
    assert said["timetables"].split() == timetable.names()


def test_defaults_and_bounds_are_the_pipelines() -> None:
    ours = inspect.signature(generate).parameters
    theirs = inspect.signature(LatentDiffusionPipeline.__call__).parameters
    pairs = {
        "steps": "num_inference_steps",
        "rescale": "guidance_rescale",
        "number": "num_images_per_prompt",
        "negative": "negative_prompt",
    }
    for name in (
        "guidance",
        "guidance_scale",
        "solver",
        "timetable",
        "height",
        "width",
        "seed",
        "first",
    ):
        assert ours[name].default == theirs[name].default
    for name, its in pairs.items():
        assert ours[name].default == theirs[its].default

    assert get_args(ours["steps"].annotation)[1].max == arguments.MAX_STEPS


def test_emoji_without_the_packages_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing.ttf")
    arguments = ["data", "emoji", "--out", str(tmp_path / "emoji"), "--font", missing]
    refused(arguments, "fonts-noto-color-emoji", capsys)
    assert not list(tmp_path.iterdir())


def test_interrupting_a_real_process_is_quiet(model: Path, out: Path) -> None:
    # What a shell runs in its background begins with SIGINT ignored; so may these tests.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    running = "import sys; from latentdiff.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", f"{heeding}; {running}"]
    command += ["generate", "a cat", "--model", str(model), "--out", str(out), "--seed", "7"]
    process = subprocess.Popen(
        [*command, "-n", "10000", "--guidance-scale", "1", "--steps", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline().strip()  # the first picture of thousands is on the disk
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, said) == (130, "seed 7\n")
    assert Path(first).name == "00000-7.png"
    assert not list(out.glob(".*"))

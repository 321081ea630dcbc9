"""Batches of very many pictures: the same to the byte however they are made, and after a kill."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scripts import ROOT, picture_folder, script
from tiny import tiny_bundle

from latentdiff import Bundle, LatentDiffusionPipeline
from latentdiff.data.folder import read_folder
from latentdiff.formats.autoencoder_files import load_autoencoder
from latentdiff.learning.batches import encode_pictures
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.pictures import open_picture

SCRIPT = ROOT / "pipelines/batch.py"


def batch(*words: str | Path) -> None:
    """The script, in this process."""
    spec = importlib.util.spec_from_file_location("batch_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    before, threads = sys.argv, torch.get_num_threads()
    sys.argv = ["batch.py", *map(str, words)]
    try:
        module.main()
    finally:
        sys.argv = before
        torch.set_num_threads(threads)


def prompts(file: Path, count: int) -> Path:
    rows = [{"prompt": f"a red heart, {number}"} for number in range(count)]
    rows[1]["negative_prompt"] = "a cat"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{p.relative_to(folder)}": hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle().save(tmp_path_factory.mktemp("batch") / "model")


def test_a_batch_that_was_killed_is_made_whole(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = prompts(tmp_path / "prompts.jsonl", 5), tmp_path / "drawn"
    asked = ["draw", source, "--model", model, "--steps", "2", "--chunk", "2", "--seed", "3"]
    batch(*asked, "--out", out)
    wanted = contents(out)
    assert set(wanted) == {
        *(f"00000/0000000{number}.png" for number in range(5)),
        *("metadata.parquet", "batch.json"),
    }
    for name in ("00000/00000001.png", "00000/00000004.png", "metadata.parquet"):
        (out / name).unlink()
    capsys.readouterr()
    batch(*asked, "--out", out)
    assert "2 chunks of 2 to do" in capsys.readouterr().out
    assert contents(out) == wanted

    pipe = LatentDiffusionPipeline.from_pretrained(model, device="cpu")
    run = {"num_inference_steps": 2, "seed": 3, "progress": False}
    for number, negative in ((1, "a cat"), (4, "")):
        words = f"a red heart, {number}"
        alone = pipe(words, negative_prompt=negative, first=number, **run).images[0]
        drawn = open_picture(out / f"00000/0000000{number}.png")
        assert np.abs(np.asarray(alone).astype(int) - np.asarray(drawn)).max() <= 1
    examples = read_folder(out)
    assert [example.captions for example in examples] == [(f"a red heart, {n}",) for n in range(5)]


def test_what_is_no_batch_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = prompts(tmp_path / "prompts.jsonl", 2)
    asked = ["draw", source, "--model", model, "--steps", "1", "--out", tmp_path / "out"]
    batch(*asked)
    (tmp_path / "other.jsonl").write_text('{"prompt": "a cat", "seed": 3}\n')
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "no.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "negative_prompt": 3}\n')
    encode = ["encode", tmp_path, "--out", tmp_path / "new", "--model", model / "vae"]
    other = ["draw", tmp_path / "other.jsonl", "--out", tmp_path / "new"]
    for words, told in (
        ([*asked, "--seed", "4"], "other settings"),
        (other, "'seed'"),
        ([*other[:1], tmp_path / "none.jsonl", *other[2:]], "no prompt"),
        ([*other[:1], tmp_path / "gone.jsonl", *other[2:]], "cannot read"),
        ([*asked[:-1], tmp_path], "something else"),
        (["encode", tmp_path, "--out", tmp_path / "new"], "needs the --model"),
        ([*encode, "--size", "16", "--steps", "3"], "--steps is of draw alone"),
        ([*encode, "--size", "0"], "--size is at least 1"),
        ([*asked, "--address", "auto"], "--address is for --workers"),
        ([*other[:1], tmp_path / "no.jsonl", *other[2:]], "row 2: negative_prompt"),
    ):
        with pytest.raises(SystemExit) as ended:
            batch(*words)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_stage_two_reads_what_was_encoded_ahead(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pictures, out = picture_folder(tmp_path / "pictures", 7), tmp_path / "latents"
    asked = ["encode", pictures, "--model", model / "vae", "--size", "16", "--chunk", "3"]
    batch(*asked, "--out", out)
    wanted = contents(out)
    (out / "done/00000001").unlink()
    batch(*asked, "--out", out)
    assert contents(out) == wanted
    others = picture_folder(tmp_path / "others", 7)
    one, told = next(others.glob("*.png")), others / "metadata.jsonl"
    one.rename(others / "another.png")
    told.write_text(told.read_text().replace(one.name, "another.png"))
    with pytest.raises(SystemExit):
        batch(*asked[:1], others, *asked[2:], "--out", out)
    assert "begun with other settings or rows" in capsys.readouterr().err

    examples, autoencoder = read_folder(pictures), load_autoencoder(model / "vae")
    machine = Accelerator(cpu=True)
    fresh = encode_pictures(autoencoder, examples, 16, tmp_path / "cache", machine)
    monkeypatch.setattr(type(autoencoder), "moments", None)  # nothing is encoded again
    kept = encode_pictures(autoencoder, examples, 16, out, machine)
    assert (kept - fresh).abs().max() < 1e-5


def actors(mark: str) -> list[int]:
    """The processes of Ray's actors that were started with a mark in their environment."""
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes()
                found += [int(folder.name)] if b"ray::" in command and b"Worker" in command else []
        except OSError:  # another's, or gone
            continue
    return found


def by_two(words: list[str | Path], kills: int) -> int:
    """The script with two workers of Ray, of which one is killed again and again."""
    mark = f"latentdiff-test-{uuid.uuid4().hex}"
    own = {"LATENTDIFF_TEST": mark, "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, SCRIPT, *words, "--workers", "2"]
    process = subprocess.Popen(command, env=os.environ | own, stdout=subprocess.DEVNULL)
    killed, random = 0, np.random.default_rng(0)
    while process.poll() is None:
        time.sleep(random.uniform(1, 4))
        out = Path(words[words.index("--out") + 1])
        begun = any(out.rglob("*.png")) or any(out.rglob("*.safetensors"))
        if begun and killed < kills and (running := actors(mark)):
            os.kill(int(random.choice(running)), signal.SIGKILL)
            killed += 1
    assert process.returncode == 0
    return killed


STAGE_2 = {
    "data": {"size": 16, "held_out_fraction": 0.0},
    "unet": {"channels": [64, 64], "attention": [True, False], "head_dim": 16},
    "text": {"vocabulary": 540, "window": 8, "width": 32, "layers": 1, "heads": 2},
    "optim": {"lr": 1e-3, "steps": 3, "warmup": 1, "batch_size": 4},
    "sample_prompts": ["a red disc"],
    "save_dtype": "float32",
}


def train_on(
    pictures: Path, model: Path, folders: list[Path], out: Path, patch: pytest.MonkeyPatch
) -> None:
    """Train a small model on latents of each folder; all weights are those of the first, to the
    bit, and no picture is encoded."""
    stage = script("diffusion")
    (out / "stage.yaml").write_text(json.dumps(STAGE_2))  # JSON is YAML
    patch.setattr(DiffusersAutoencoder, "moments", None)
    found: list[dict[str, torch.Tensor]] = []
    for number, latents in enumerate(folders):
        given = [f"vae={model / 'vae'}", f"data.root={pictures}", f"data.latents={latents}"]
        given.append(f"out={out / f'run-{number}'}")
        stage.train(stage.load_config(stage.DiffusionConfig, out / "stage.yaml", given), False)
        bundle = Bundle.load(out / f"run-{number}" / "model")
        found.append(dict(bundle.network.module.state_dict()))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
@pytest.mark.parametrize(
    ("count", "kills"), [pytest.param(2000, 5, marks=pytest.mark.slow), (120, 1)]
)
def test_two_workers_of_ray_one_killed_give_what_one_process_gives(
    model: Path, tmp_path: Path, count: int, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prompts(tmp_path / "prompts.jsonl", count)
    asked = ["draw", source, "--model", model, "--steps", "6", "--chunk", "4"]
    batch(*asked, "--out", tmp_path / "one")
    assert by_two([*asked, "--out", tmp_path / "two"], kills) == kills
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    pictures = picture_folder(tmp_path / "pictures", 40)
    asked = ["encode", pictures, "--model", model / "vae", "--size", "16", "--chunk", "4"]
    batch(*asked, "--out", tmp_path / "latents")
    by_two([*asked, "--out", tmp_path / "by-two"], 0)
    assert contents(tmp_path / "by-two") == contents(tmp_path / "latents")
    if count == 120:
        train_on(
            pictures, model, [tmp_path / "latents", tmp_path / "by-two"], tmp_path, monkeypatch
        )

"""`latentdiff serve` as a process, and the examples of docs/server.md against it."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_bundle

from latentdiff import LatentDiffusionPipeline, load_autoencoder
from latentdiff.cli import main
from latentdiff.cli.serve import leave_a_core, swift
from latentdiff.pipeline import Request

DOCS = (Path(__file__).parents[2] / "docs/server.md").read_text("utf-8")
RUN = "import sys; from latentdiff.cli import run; sys.exit(run())"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle().save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    command = [sys.executable, "-c", RUN, "serve", "--port", "0", "--model", str(model)]
    for option, seed in (("--vae", 1), ("--preview-vae", 2)):
        command += [option, str(tiny_bundle(seed=seed).save(model.parent / f"{seed}") / "vae")]
    command += ["--dtype", "float32"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert server.stdout is not None
    yield server.stdout.readline().strip()
    server.send_signal(signal.SIGINT)
    _, said = server.communicate(timeout=30)
    assert "a red heart" not in said


@pytest.mark.parametrize("about", ["images.generate", "curl"])
def test_the_examples_run(
    about: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", DOCS, re.DOTALL)
    ((kind, example),) = [(kind, text) for kind, text in blocks if about in text]
    example = example.replace("http://127.0.0.1:7860", address)
    if kind == "python":
        exec(compile(example, "docs/server.md", "exec"), {})
        assert [Image.open(f"heart-{n}.png").size for n in range(2)] == [(16, 16)] * 2
    else:
        done = subprocess.run(example, shell=True, capture_output=True, text=True, check=True)
        assert '"seeds":["7"]' in done.stdout


def test_it_decodes_by_the_autoencoders_it_was_told(address: str, model: Path) -> None:
    """Pictures by the one of --vae, previews by the one of --preview-vae."""
    asked = {"prompt": "a red heart", "seed": 7, "num_inference_steps": 3, "preview_every": 1}
    with httpx.Client(base_url=address, timeout=60) as client:
        job = client.post("/jobs", json=asked).json()["id"]
        lines = client.get(f"/jobs/{job}/events").text.split("\n")
        told = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        drawn = pixels(client.get(told[-1]["pictures"][0]).content)
    shown = [one["preview"] for one in told if "preview" in one][-1]
    shown = pixels(base64.b64decode(shown.partition(",")[2]))
    pipe = LatentDiffusionPipeline.from_pretrained(model, engine="eager")
    run = pipe.prepare(Request(prompt="a red heart", seed=7, num_inference_steps=3))
    own = np.asarray(run.finish("np").images)[0] * 255
    by, again = (load_autoencoder(model.parent / f"{seed}" / "vae") for seed in (1, 2))
    decoded, previewed = (np.asarray(run.preview("np", by=one))[0] * 255 for one in (by, again))
    assert abs(drawn - decoded).max() < 3
    assert abs(shown - previewed).max() < 3
    for one, other in ((drawn, own), (shown, own), (shown, drawn)):
        assert abs(one - other).max() > 10


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


@pytest.mark.parametrize("option", ["--vae", "--preview-vae"])
def test_an_autoencoder_that_is_not_there_is_one_line(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", option, "none"]) == 2
    said = capsys.readouterr().err
    assert "none: no such autoencoder" in said
    assert said.count("\n") == 1


def test_it_draws_in_what_the_cpu_is_fast_in_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert swift("auto", "auto") == swift("auto", "cpu") == ("bfloat16" if has else "auto")
        assert (swift("float32", "auto"), swift("auto", "mps")) == ("float32", "auto")


def test_a_small_network_leaves_a_core_to_the_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    own, bundle = torch.get_num_threads(), tiny_bundle()
    try:
        torch.set_num_threads(3)
        leave_a_core(bundle)  # conftest says how many
        assert torch.get_num_threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        leave_a_core(bundle)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(own)


def test_a_port_that_is_taken_is_one_line(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = address.rpartition(":")[2]
    assert main(["serve", "--port", port]) == 2
    assert "Address already in use; try another --port" in capsys.readouterr().err

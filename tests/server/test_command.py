"""`latentdiff serve` as a process, and the examples of docs/server.md against it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import tiny_bundle

from latentdiff.cli import main
from latentdiff.cli.serve import swift

DOCS = (Path(__file__).parents[2] / "docs/server.md").read_text("utf-8")
RUN = "import sys; from latentdiff.cli import run; sys.exit(run())"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle().save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    command = [sys.executable, "-c", RUN, "serve", "--port", "0", "--model", str(model)]
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


def test_it_draws_in_what_the_cpu_is_fast_in_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert swift("auto", "auto") == swift("auto", "cpu") == ("bfloat16" if has else "auto")
        assert (swift("float32", "auto"), swift("auto", "mps")) == ("float32", "auto")


def test_a_port_that_is_taken_is_one_line(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = address.rpartition(":")[2]
    assert main(["serve", "--port", port]) == 2
    assert "Address already in use; try another --port" in capsys.readouterr().err

"""Freed memory is kept where a process is our own, and only there; files that are mapped take no
more than what is computed with.
"""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.bundle import Bundle
from latentdiff.formats.weights import WeightFiles
from latentdiff.lora import add_lora, attach_lora, detach_lora, lora_of
from latentdiff.memory import let_go_of_pages

TRAIN = """
from latentdiff.learning.config import RunConfig
from latentdiff.learning.run import Run
Run(RunConfig(out="run"))
"""
COMMAND = """
import sys
from latentdiff.cli import run
sys.argv = ["latentdiff", "--version"]
run()
"""

CHURN = """
import resource, torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(3):  # until the process is as large as it gets
    faults()
print(faults())
"""


def faults(tmp_path: Path, before: str) -> int:
    """Page faults of tensors that come and go, in a process that ran something before."""
    done = subprocess.run(
        [sys.executable, "-c", before + CHURN],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
@pytest.mark.parametrize("own", [TRAIN, COMMAND], ids=["training", "command"])
def test_our_processes_keep_freed_memory(tmp_path: Path, own: str) -> None:
    assert faults(tmp_path, own) * 10 < faults(tmp_path, "import latentdiff")


GENERATE = """
from latentdiff.cli import main

assert main(["generate", "a red heart", "--seed", "7"]) == 0
"""
PEAK = """
from pathlib import Path
print(next(line for line in Path("/proc/self/status").open() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak of a program")
def test_a_picture_takes_little_beside_torch(tmp_path: Path) -> None:
    """The whole of `latentdiff generate`, its weights included."""
    peaks: list[int] = []
    for code in ("import torch", GENERATE):
        done = subprocess.run(
            [sys.executable, "-c", code + PEAK],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.split()[-2]) // 1024)
    assert peaks[1] - peaks[0] < 230


def mapped(file: Path) -> int:
    """Bytes of a file that are mapped and in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            inside = words[-1] == str(file.resolve())
        elif words[0] == "Rss:" and inside:
            total += 1024 * int(words[1])
    return total


only_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems keep what is mapped")


@only_linux
def test_a_file_is_let_go_of_while_it_is_converted(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    values = {name: torch.randn(2**20, generator=random) for name in "0123"}
    save_file(values, file := tmp_path / "weights.safetensors")
    files, cpu = WeightFiles([file]), torch.device("cpu")
    for name, value in values.items():
        assert torch.equal(files.read(name, torch.bfloat16, cpu), value.bfloat16())
        assert mapped(file) < 2**20
    assert torch.equal(whole := files.read("0", torch.float32, cpu), values["0"])
    assert mapped(file) >= whole.nbytes


@only_linux
def test_what_was_written_to_memory_is_not_let_go_of(tmp_path: Path) -> None:
    """Nor what is no file's."""
    value = torch.arange(2.0**20)
    save_file({"a": value}, file := tmp_path / "weights.safetensors")
    read = WeightFiles([file]).read("a", torch.float32, torch.device("cpu"))
    let_go_of_pages(read.data_ptr(), read.nbytes)
    assert mapped(file) < 2**20
    assert torch.equal(read, value)
    read.data[2**19] = -1.0  # which the tensor does not count
    value[2**19] = -1.0
    for each in (read, value):
        let_go_of_pages(each.data_ptr(), each.nbytes)
        assert each[2**19] == -1.0
    assert torch.equal(read, value)


@only_linux
def test_packed_weights_take_the_place_of_mapped_ones(tmp_path: Path) -> None:
    """A LoRA reads them again, and goes out without a trace."""
    folder = Bundle.load(dtype=torch.float32, device="cpu").save(tmp_path / "model")
    pipe = LatentDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu")
    unet = pipe.bundle.network.module
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    size = file.stat().st_size
    assert mapped(file) > 0.9 * size

    def draw() -> torch.Tensor:
        given: dict[str, Any] = {"seed": 1, "num_inference_steps": 1, "output_type": "pt"}
        return pipe("a red heart", progress=False, **given).images

    before = draw()
    convolutions = sum(p.nbytes for p in unet.parameters() if p.ndim == 4)
    assert mapped(file) < size - 0.8 * convolutions
    other = Bundle.load(dtype=torch.float32, device="cpu")
    for parameter in add_lora(other, rank=2, targets="conv1"):
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    attach_lora(pipe.bundle, lora_of(other), "mine")
    assert (draw() - before).abs().max() > 0.01
    detach_lora(pipe.bundle, "mine")
    assert torch.equal(draw(), before)
    stored = load_file(file)
    assert all(torch.equal(value, stored[name]) for name, value in unet.state_dict().items())

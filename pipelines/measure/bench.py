"""Seconds that pictures and networks take here, by each engine, and in other libraries.

    python pipelines/measure/bench.py --peers

All contestants of a row compute the same with the same weights, in turn, round after round; a
ratio is the median over rounds of the first contestant's seconds to another's. The bundled model
draws 20 steps of DPM-Solver++(2M) with guidance 4; the networks of Stable Diffusion's size have
random weights; whole commands start a process each. The engine compiled draws pictures where
`latentdiff compile` was run before, with `--dtype bfloat16` for that precision, too; `--compile`
makes code of the U-Net of Stable Diffusion's size for this run alone, which takes minutes and
gigabytes. The engine openvino takes part where its library is installed, bfloat16 where the
processor computes in it. Prints the command, and tables for docs/benchmarks.md.
"""

import argparse
import copy
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.diffusion.condition import Condition
from latentdiff.formats.location import find
from latentdiff.memory import keep_freed_memory
from latentdiff.models.autoencoder import Autoencoder, DiffusersAutoencoder
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.models.engines import (
    OpenVinoAutoencoder,
    OpenVinoNetwork,
    PackedAutoencoder,
    PackedNetwork,
    cannot_convert,
    cannot_pack,
)
from latentdiff.models.engines.compiling import compiling
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.network import DiffusersUNet, Network
from latentdiff.pipeline.few_steps import FOLDER

PROMPT, STEPS, SCALE = "a red heart", 20, 4.0
Sides = dict[str, Callable[[], object]]
Rows = dict[str, Callable[[], Sides]]
"""What makes the contestants of each row: one row's networks at a time are in memory."""
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
SMALL = {**VAE, "block_out_channels": [32] * 4}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time pictures and networks.")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--peers", action="store_true", help="beside diffusers")
    parser.add_argument(
        "--processor",
        action="store_true",
        help="processor seconds, where other work goes on; not of whole commands",
    )
    parser.add_argument("--compile", action="store_true", help="the large U-Net, too")
    parser.add_argument("--rounds", type=int, default=10, help="of each comparison")
    parser.add_argument("--pixels", type=int, default=256, help="a side, of the large networks")
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, default=list(ROWS), help="the comparisons to make"
    )
    given = parser.parse_args()
    if given.processor and "commands" in given.only:
        parser.error("--processor counts no other processes: leave commands out, by --only")
    try:
        folder = find(given.model)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    keep_freed_memory()
    clock = time.process_time if given.processor else time.perf_counter
    print(shlex.join(["python", *sys.argv]), machine(), "", sep="\n")
    print("| what | how | seconds | ratio |", "|---|---|---|---|", sep="\n")
    for row in given.only:
        for name, make in ROWS[row](folder, given.peers, given.compile, given.pixels).items():
            report(name, compare(make(), given.rounds, clock))


def machine() -> str:
    """The processor, its threads and the libraries."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")
    able = torch.backends.cpu.get_cpu_capability()
    halves = "with bfloat16" if len(precisions()) > 1 else "no bfloat16"
    threads = torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return (
        f"{model}, {able}, {halves}, {threads} threads, torch {torch.__version__}, load {load:.1f}"
    )


def precisions() -> list[torch.dtype]:
    """Float32, and bfloat16 where a packed network computes in it."""
    probe = KLAutoencoder(SMALL).bfloat16()
    return [torch.float32] if cannot_pack(probe) else [torch.float32, torch.bfloat16]


def compare(
    sides: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, compute in sides.items():
            start = clock()
            with torch.no_grad():
                compute()
            times[name].append(clock() - start)
    return {name: taken[1:] for name, taken in times.items()}


def report(what: str, times: Mapping[str, list[float]]) -> None:
    """Print the rows of a comparison: median seconds, and the median ratio to the first."""
    first = next(iter(times.values()))
    for how, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(first, taken, strict=True))
        print(f"| {what} | {how} | {statistics.median(taken):.3f} | {ratio:.2f} |", flush=True)


def pictures(folder: Path, peers: bool, compiles: bool, pixels: int) -> Rows:
    """One picture of a whole model, after loading."""
    return {
        f"one picture, {_name(dtype)}": partial(_pictures, folder, dtype, peers)
        for dtype in precisions()
    }


def _pictures(folder: Path, dtype: torch.dtype, peers: bool) -> Sides:
    sides: Sides = _their_pictures(folder, dtype) if peers else {}
    for engine in ("eager", "packed", "compiled", "openvino"):
        try:
            pipe = LatentDiffusionPipeline.from_pretrained(folder, dtype=dtype, engine=engine)
        except UserError as error:  # there is no code of it, or no library
            print(f"{_name(dtype)}, left out: {error}", file=sys.stderr)
            continue
        sides[f"latentdiff, {engine}"] = lambda pipe=pipe: pipe(
            PROMPT, num_inference_steps=STEPS, guidance_scale=SCALE, seed=0, progress=False
        )
    return sides


def _their_pictures(folder: Path, dtype: torch.dtype) -> Sides:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    sides: Sides = {}
    for name in ("diffusers", "diffusers, channels-last"):
        pipe: Any = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        if "last" in name:
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)
        sides[name] = lambda pipe=pipe: pipe(
            PROMPT, num_inference_steps=STEPS, guidance_scale=SCALE
        )
    return sides


def few(folder: Path, peers: bool, compiles: bool, pixels: int) -> Rows:
    """One picture by the default run, and in few calls of the model's LoRA for that."""
    if not (folder / FOLDER).is_dir():
        print(f"few calls, left out: {folder.name} has no LoRA for that", file=sys.stderr)
        return {}
    return {
        f"one picture, {_name(dtype)}, packed": partial(_few, folder, dtype)
        for dtype in precisions()
    }


def _few(folder: Path, dtype: torch.dtype) -> Sides:
    given: dict[str, Any] = {"seed": 0, "progress": False}
    full, fast = (
        LatentDiffusionPipeline.from_pretrained(folder, dtype=dtype, engine="packed", fast=fast)
        for fast in (False, True)
    )
    sides: Sides = {"20 steps, guided": lambda: full(PROMPT, **given)}
    for calls in (4, 2, 1):
        told = f"`--fast`, {calls} call{'s' * (calls > 1)}"
        sides[told] = lambda calls=calls: fast(PROMPT, num_inference_steps=calls, **given)
    return sides


def unets(folder: Path, peers: bool, compiles: bool, pixels: int) -> Rows:
    """One call of a U-Net of Stable Diffusion 1's size, under guidance."""
    return {
        f"U-Net of SD 1, {pixels} px, {_name(dtype)}": partial(
            _unet, dtype, peers, compiles, pixels // 8
        )
        for dtype in precisions()
    }


def _unet(dtype: torch.dtype, peers: bool, compiles: bool, side: int) -> Sides:
    config = {"cross_attention_dim": 768, "sample_size": 64}
    module = CrossAttentionUNet(config).to(dtype).eval().requires_grad_(False)
    x, states = torch.randn(2, 4, side, side, dtype=dtype), torch.randn(2, 77, 768, dtype=dtype)
    t, condition = torch.full((2,), 500.0), Condition(states=states)
    eager = DiffusersUNet(module, 4)
    packed = PackedNetwork.of(eager)
    sides: Sides = {}
    if peers:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        with torch.device("meta"):
            theirs: Any = UNet2DConditionModel(cross_attention_dim=768)
        theirs.load_state_dict(module.state_dict(), assign=True)
        sides |= _theirs(theirs, lambda network: network(x, t, states))
        if dtype != torch.float32:
            whole: Any = copy.deepcopy(theirs).float()
            sides["diffusers, float32"] = lambda: whole(x.float(), t, states.float())
    engines: dict[str, Network] = {"eager": eager, "packed": packed}
    if compiles:
        with _compiling(eager) as fast:
            fast(x, t, condition)
        engines["compiled"] = fast
    if not cannot_convert(module):
        engines["openvino"] = OpenVinoNetwork.of(eager, packed)
    for name, network in engines.items():
        sides[f"latentdiff, {name}"] = lambda network=network: network(x, t, condition)
    return sides


@contextmanager
def _compiling(network: Network) -> Iterator[Network]:
    """See `compiling`; what is made outlives its file."""
    with TemporaryDirectory() as cache, torch.no_grad():
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = cache
        try:
            with compiling(network, partial(print, file=sys.stderr)) as fast:
                yield fast
        finally:
            del os.environ["XDG_CACHE_HOME"]
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def _theirs(network: Any, call: Callable[[Any], object]) -> Sides:
    """A network of diffusers as it is, and channels-last; of the latter a copy is made."""
    last: Any = copy.deepcopy(network).to(memory_format=torch.channels_last)
    return {
        "diffusers": lambda: call(network),
        "diffusers, channels-last": lambda: call(last),
    }


def autoencoders(folder: Path, peers: bool, compiles: bool, pixels: int) -> Rows:
    """One picture decoded by an autoencoder of Stable Diffusion's size."""
    return {
        f"VAE of SD, {pixels} px, {_name(dtype)}": partial(_autoencoder, dtype, peers, pixels // 8)
        for dtype in precisions()
    }


def _autoencoder(dtype: torch.dtype, peers: bool, side: int) -> Sides:
    module = KLAutoencoder(VAE).to(dtype).eval().requires_grad_(False)
    latents = torch.randn(1, 4, side, side, dtype=dtype)
    eager = DiffusersAutoencoder(module)
    packed = PackedAutoencoder.of(eager)
    sides: Sides = {}
    if peers:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        theirs: Any = AutoencoderKL(**VAE)  # pyright: ignore[reportArgumentType]
        theirs.load_state_dict(module.state_dict(), assign=True)
        sides |= _theirs(theirs, lambda network: network.decode(latents))
    engines: dict[str, Autoencoder] = {"eager": eager, "packed": packed}
    if not cannot_convert(module):
        engines["openvino"] = OpenVinoAutoencoder.of(eager, packed)
    for name, decoder in engines.items():
        sides[f"latentdiff, {name}"] = lambda decoder=decoder: decoder.decode(latents)
    return sides


def commands(folder: Path, peers: bool, compiles: bool, pixels: int) -> Rows:
    """Whole commands; `import torch` alone is what none can save."""
    run = "import sys; from latentdiff.cli import run; sys.exit(run())"

    def process(*words: str) -> Callable[[], object]:
        return lambda: subprocess.run(
            [sys.executable, "-c", *words], check=True, stdout=-3, stderr=-3
        )

    def draw() -> None:
        with TemporaryDirectory() as out:
            process(run, "generate", PROMPT, "--seed", "7", "-m", str(folder), "-o", out)()

    sides: Sides = {"python -c 'import torch'": process("import torch")}
    sides["latentdiff generate"] = draw
    sides["latentdiff generate --help"] = process(run, "generate", "--help")
    return {"a whole process": lambda: sides}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


ROWS = {
    "pictures": pictures,
    "few": few,
    "unets": unets,
    "autoencoders": autoencoders,
    "commands": commands,
}

if __name__ == "__main__":
    main()

"""Kill training runs and stop them at every step; each must end as the run that was left alone.

    PYTHONPATH=.:tests python tests/training/kills.py --kills 200 --every-step

One process imports everything; every run is a fork of it that calls the training script's own
`train`. Half of the kills come from outside at a random moment. The others strike inside a save:
the run counts the lines of `learning/checkpoint.py` and `files.py` that it executes there and kills
itself at a random one, so each of them is a fault point. Both are SIGKILL.
"""

import argparse
import fcntl
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lab import NEEDS, STAGES, STEPS, Lab, cpu, samples_of

from latentdiff import files
from latentdiff.learning import checkpoint
from latentdiff.learning.run import Run

RESULT = {
    "autoencoder": "vae",
    "diffusion": "model",
    "finetune": "pytorch_lora_weights.safetensors",
    "distill": "model",
    "denoising_gan": "model",
    "energy": "model",
    "joint": "model",
}


def trace_saves(at_line: Callable[[int], object]) -> None:
    """Have `at_line(n)` called before the n-th line of `save_checkpoint` and what it calls."""
    count = 0

    def line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            at_line(count)
        return line

    def call(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in (checkpoint.__file__, files.__file__):
            return None
        at: FrameType | None = frame
        while at is not None and at.f_code.co_name != "save_checkpoint":
            at = at.f_back
        return line if at is not None else None

    sys.settrace(call)


def kill_at(number: int) -> None:
    """SIGKILL for this process at the `number`th line of saving."""

    def strike(line: int) -> None:
        if line == number:
            os.kill(os.getpid(), signal.SIGKILL)

    trace_saves(strike)


def stop_after_a_step() -> None:
    """SIGTERM for this process once it has taken one step."""
    optimize = Run.optimize

    def stopped(self: Run, step: int, networks: Any) -> bool:
        done = optimize(self, step, networks)
        os.kill(os.getpid(), signal.SIGTERM)
        return done

    Run.optimize = stopped


def files_of(run: Path, stage: str) -> Iterator[tuple[str, bytes]]:
    """Files that a finished run must share with the run left alone: all but times and pictures."""
    newest = checkpoint.checkpoints(run / "checkpoints")[0]
    assert checkpoint.find_fault(newest) is None
    yield "log", (run / "log.jsonl").read_bytes()
    for root in (newest, run / RESULT[stage]):
        for path in sorted(p for p in (root, *root.rglob("*")) if p.is_file()):
            if path.name == "README.md":  # the card, which names the run's folder
                continue
            yield f"{root.name}/{path.relative_to(root)}", content(path)


def content(path: Path) -> bytes:
    """A file's bytes; of safetensors the header sorted, whose metadata has no order of its own."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]


def compare(one: Path, other: Path, stage: str) -> None:
    """Weights, averages, optimizer, result, every logged loss and sample: equal to the last bit."""
    expected, got = dict(files_of(one, stage)), dict(files_of(other, stage))
    assert expected.keys() == got.keys(), expected.keys() ^ got.keys()
    for name, content in expected.items():
        assert content == got[name], f"{other.name}: {name} differs from {one.name}"
    assert len(expected["log"].splitlines()) >= STEPS
    left = [path for path in other.rglob(".*") if path.name != ".lock"]
    assert not left, left
    assert samples_of(one) == samples_of(other)
    assert len(samples_of(one)) == STEPS


def run_whole(lab: Lab, stage: str) -> int:
    """The run that is left alone; how many lines one of its saves executes."""
    out = f"{stage}-whole"
    with mmap.mmap(-1, 8) as shared:  # with the child

        def count(line: int) -> None:
            shared[:] = line.to_bytes(8, "little")

        child = lab.start(stage, out, before=lambda: trace_saves(count))
        lab.ended(child, out, 0)
        return int.from_bytes(shared[:], "little") // STEPS


def kill_outside(child: int, run: Path, chance: random.Random) -> None:
    """SIGKILL for a run at a random moment of its next few steps; none if it ends before."""
    steps = run / "samples.jsonl"
    wanted = (steps.stat().st_size if steps.exists() else 0) + 40 * chance.randint(0, 3)
    while not steps.exists() or steps.stat().st_size < wanted:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)
    time.sleep(chance.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)


def kill(lab: Lab, stage: str, kills: int, lines: int, chance: random.Random) -> list[str]:
    """Runs of a stage killed `kills` times in all, each run then compared; where kills struck."""
    struck: list[str] = []
    run, tries = 0, 0
    while len(struck) < kills:
        run += 1
        out = f"{stage}-killed-{run}"
        code = -signal.SIGKILL
        while code == -signal.SIGKILL and len(struck) < kills:
            tries += 1
            assert tries < 10 * kills + 10, "the runs end before they are killed"
            if inside := len(struck) % 2 == 0:
                number = chance.randint(1, 2 * lines)  # of the first two saves
                child = lab.start(stage, out, before=lambda at=number: kill_at(at))
            else:
                child = lab.start(stage, out)
                kill_outside(child, lab.folder / out, chance)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == -signal.SIGKILL:
                struck.append("inside a save" if inside else "from outside")
            elif code:
                raise AssertionError((lab.folder / f"{out}.log").read_text())
        lab.finish(stage, out)
        compare(lab.folder / f"{stage}-whole", lab.folder / out, stage)
    return struck


def stop_at_every_step(lab: Lab, stage: str, accumulation: int, workers: int) -> None:
    """A run stopped after each of its steps in turn; all is compared at every stop."""
    ways = [f"optim.accumulation={accumulation}"]
    ways += [f"data.workers={workers}"] if workers else []
    whole, out = f"{stage}-kept-{accumulation}", f"{stage}-stopped-{accumulation}-{workers}"
    if not (lab.folder / whole).exists():
        lab.finish(stage, whole, ways[0], "keep_checkpoints=99")
    for step in range(1, STEPS + 1):
        child = lab.start(stage, out, *ways, before=stop_after_a_step)
        lab.ended(child, out, 143)
        name = f"checkpoints/step-{step:08d}/manifest.json"  # sums of weights, averages, all
        assert (lab.folder / out / name).read_text() == (lab.folder / whole / name).read_text()
    lab.finish(stage, out, *ways)
    compare(lab.folder / whole, lab.folder / out, stage)
    print(f"{stage}, accumulation {accumulation}, {workers} workers: equal at every stop")


def signal_twice(lab: Lab) -> None:
    """A second SIGTERM in the middle of a step: exit code 143 at once, without a save."""
    out = "diffusion-twice"

    def linger(self: Run, step: int, networks: Any) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(0.01)

    child = lab.start("diffusion", out, before=lambda: setattr(Run, "optimize", linger))
    log = lab.folder / f"{out}.log"
    while not log.exists() or "once more" not in log.read_text():
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    lab.ended(child, out, 143)
    assert not checkpoint.checkpoints(lab.folder / out / "checkpoints")
    print("a second signal: stopped at once")


def kill_in_a_drawing(lab: Lab, stage: str) -> None:
    """SIGKILL in the middle of the last drawing: its step is saved, and the next run draws it."""
    out = f"{stage}-drawing"
    folder = lab.folder / out
    picture = Run.picture

    def killed(self: Run, step: int, name: str, image: Any) -> None:
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGKILL)
        picture(self, step, name, image)

    child = lab.start(stage, out, before=lambda: setattr(Run, "picture", killed))
    lab.ended(child, out, -signal.SIGKILL)
    drawn = {path.name for path in (lab.folder / f"{stage}-whole/pictures").iterdir()}
    missing = drawn - {path.name for path in folder.glob("pictures/*")}
    assert missing
    assert checkpoint.checkpoints(folder / "checkpoints")[0].name == f"step-{STEPS:08d}"
    lab.finish(stage, out)
    folders = [lab.folder / run / "pictures" for run in (f"{stage}-whole", out)]
    for name in missing:
        assert len({(one / name).read_bytes() for one in folders}) == 1
    compare(lab.folder / f"{stage}-whole", folder, stage)


def signal_in_the_last_drawing(lab: Lab) -> None:
    """SIGTERM after the last step: the run ends before its result, which the next run makes."""
    stage, out = "finetune", "finetune-last"
    picture = Run.picture

    def drawn(self: Run, step: int, name: str, image: Any) -> None:
        picture(self, step, name, image)
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    child = lab.start(stage, out, before=lambda: setattr(Run, "picture", drawn))
    lab.ended(child, out, 143)
    assert not (lab.folder / out / RESULT[stage]).exists()
    lab.finish(stage, out)
    compare(lab.folder / f"{stage}-whole", lab.folder / out, stage)


def orphan(lab: Lab, out: str, launched: bool, *changes: str) -> Path:
    """The folder of a run whose parent ends during its first step, once the run has ended, too."""
    folder = lab.folder / out

    def parent() -> None:
        os.environ.pop("ACCELERATE_DYNAMO_MODE", None)
        if launched:
            os.environ["ACCELERATE_DYNAMO_MODE"] = "default"
        if os.fork():
            while not (folder / "samples.jsonl").exists():
                time.sleep(0.002)
            os._exit(0)
        optimize = Run.optimize

        def waited(self: Run, step: int, networks: Any) -> bool:
            while os.getppid() == before:
                time.sleep(0.002)
            return optimize(self, step, networks)

        before, Run.optimize = os.getppid(), waited

    lab.ended(lab.start("finetune", out, *changes, before=parent), out, 0)
    with (folder / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
    return folder


def start_from(lab: Lab, stages: Sequence[str]) -> None:
    """The results of stages 1 and 2 that these stages start from, as `vae` and `model`."""
    needed = {NEEDS[stage] for stage in stages if stage in NEEDS}
    needed |= {"vae"} if "model" in needed else set()
    for stage in ("autoencoder", "diffusion"):
        if (result := RESULT[stage]) in needed:
            lab.finish(stage, f"{stage}-first")
            (lab.folder / result).symlink_to(lab.folder / f"{stage}-first" / result)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every-step", action="store_true", help="stop after each step, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    arguments = parser.parse_args()
    stages: list[str] = arguments.stages
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        lab = Lab(Path(name))
        start_from(lab, stages)
        for number, stage in enumerate(stages):
            lines = run_whole(lab, stage)
            kills = (arguments.kills + number) // len(stages)
            struck = Counter(kill(lab, stage, kills, lines, chance))
            print(f"{stage}: {dict(struck)}: equal to the run left alone")
            kill_in_a_drawing(lab, stage)
        print("a kill in a drawing: its step was saved, and drawn by the run that went on")
        if "diffusion" in stages:
            signal_twice(lab)
        if "finetune" in stages:
            signal_in_the_last_drawing(lab)
            stopped = orphan(lab, "orphan", True, "checkpoint_every=99")
            (saved,) = checkpoint.checkpoints(stopped / "checkpoints")
            assert saved.name == "step-00000001"
            compare(lab.folder / "finetune-whole", orphan(lab, "nohup", False), "finetune")
            print("a signal in the last drawing, a launcher that is gone: saved and stopped")
        for stage in stages if arguments.every_step else ():
            for accumulation in (1, 4):
                stop_at_every_step(lab, stage, accumulation, 0)
                if stage == "autoencoder":  # the others have no loader
                    stop_at_every_step(lab, stage, accumulation, 2)
        print(f"{cpu():.0f} s of CPU time")


if __name__ == "__main__":
    main()

"""What a training run needs around its loop: device and precision, folder, checkpoints, records."""

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator
from PIL import Image
from torch.optim import AdamW, Optimizer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from latentdiff.errors import UserError
from latentdiff.learning.checkpoint import Tensors, load_newest, save_checkpoint
from latentdiff.learning.config import OptimConfig, RunConfig, dump_config
from latentdiff.pictures import save_png


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Linear warm-up, then constant or cosine to zero: a function of the step alone."""
    warm = min(1.0, (step + 1) / max(1, optim.warmup))
    if optim.schedule == "constant":
        return optim.lr * warm
    done = max(0.0, (step - optim.warmup) / max(1, optim.steps - optim.warmup))
    return optim.lr * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def adamw(parameters: Iterator[torch.nn.Parameter], optim: OptimConfig) -> AdamW:
    """AdamW as the configuration says."""
    return AdamW(
        parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )


class Run:
    """One training run: its Accelerator, its folder, its records and its checkpoints.

    Nothing of the method is in here; the loop stands in the script.
    """

    def __init__(self, config: RunConfig, dry: bool = False) -> None:
        self.config = config
        self.dry = dry
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.optim.accumulation,
        )
        self.out = config.out
        self.bad_steps = 0
        self.bad_in_a_row = 0
        self.signal = 0
        self.main = self.accelerator.is_main_process
        self.records: SummaryWriter | None = None
        if self.main:
            self._open_folder()

    def _open_folder(self) -> None:
        """Make the run's folder and keep the resolved configuration in it."""
        text = dump_config(self.config)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            kept = self.out / "config.yaml"
            if kept.exists() and kept.read_text() != text and not self.dry:
                kept.replace(self.out / "config.previous.yaml")
            kept.write_text(text)
        except OSError as error:
            raise UserError(f"cannot write to {self.out}: {error.strerror}") from None
        self.records = SummaryWriter(str(self.out / "tensorboard"))

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    def say(self, line: str) -> None:
        """A line to the person, from the main process, without breaking the bar."""
        if self.main:
            tqdm.write(line)

    def resume(self) -> tuple[dict[str, Tensors], dict[str, object]] | None:
        """The newest whole checkpoint of this run's folder, or None."""
        found = load_newest(self.out / "checkpoints", self.say)
        if found is not None:
            self.bad_steps = int(str(found[1].get("bad_steps", 0)))
            self.say(f"resuming {self.out} at step {found[1]['step']}")
        return found

    def save(self, step: int, tensors: dict[str, Tensors], state: dict[str, object]) -> None:
        """Write a checkpoint from the main process."""
        if self.main:
            size = sum(t.nbytes for group in tensors.values() for t in group.values())
            free = shutil.disk_usage(self.out).free
            if self.dry:
                most = (self.config.keep_checkpoints + 1) * size
                self.say(f"checkpoints take up to {most / 2**20:.1f} MiB of {free >> 20} free")
            if free < 2 * size:
                raise UserError(f"{self.out}: {free >> 20} MiB free, {size >> 19} needed to save")
            save_checkpoint(
                self.out / "checkpoints",
                step,
                tensors,
                {**state, "bad_steps": self.bad_steps},
                self.config.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def optimize(
        self, optimizer: Optimizer, parameters: list[torch.nn.Parameter], rate: float
    ) -> bool:
        """Clip and step if the gradient is finite; otherwise skip, count, and give up after many.

        Returns:
            Whether the step was taken.

        Raises:
            UserError: `max_bad_steps` gradients in a row were not finite.
        """
        for group in optimizer.param_groups:
            group["lr"] = rate
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.optim.clip)
        good = norm is None or bool(torch.isfinite(torch.as_tensor(norm)))
        if good:
            optimizer.step()
            self.bad_in_a_row = 0
        else:
            self.bad_steps += 1
            self.bad_in_a_row += 1
        optimizer.zero_grad()
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise UserError(
                f"{self.bad_in_a_row} steps in a row gave NaN or infinite gradients: lower "
                f"optim.lr or set precision: no; the last checkpoint in {self.out} is good"
            )
        return good

    def record(self, step: int, values: dict[str, float]) -> None:
        """Scalars to TensorBoard and to `log.jsonl`."""
        if self.records is None:
            return
        for name, value in values.items():
            self.records.add_scalar(name, value, step)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """A PNG grid into the run's `pictures` folder and to TensorBoard."""
        if self.records is None:
            return
        folder = self.out / "pictures"
        folder.mkdir(exist_ok=True)
        target = folder / f"{name}-{step:08d}.png"
        target.unlink(missing_ok=True)  # a resumed run draws the same step again
        save_png(image, target)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        self.records.add_image(
            name, pixels.view(image.height, image.width, 3), step, dataformats="HWC"
        )

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT are noted, to be honoured at a step's end; a second acts at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.signal:
                raise SystemExit(128 + number)
            self.signal = number
            self.say("stopping after this step; once more to stop at once")

        before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {
            number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def bar(self, start: int, stop: int) -> tqdm:
        """The progress bar of the loop, on the main process."""
        return tqdm(
            initial=start, total=stop, unit="step", disable=not self.main, dynamic_ncols=True
        )

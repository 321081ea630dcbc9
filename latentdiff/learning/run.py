"""A training run around its loop: device and precision, folder, checkpoints and records."""

import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Self, TextIO

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm

from latentdiff.bundle import Bundle
from latentdiff.errors import UserError
from latentdiff.files import make_folder, sweep, write_text
from latentdiff.learning.accumulate import Accumulation, Item, Terms, is_out_of_memory
from latentdiff.learning.checkpoint import Tensors, load_newest, save_checkpoint
from latentdiff.learning.config import RunConfig, dump_config
from latentdiff.learning.denoising import Conditioned
from latentdiff.learning.launch import (
    LAUNCHED,
    check_launch,
    crowded,
    overridden,
    refuse_split,
    spreads_over_cpus,
)
from latentdiff.learning.records import Records, check_installed
from latentdiff.learning.settings import check_settings, settings_of
from latentdiff.learning.sharding import Shown, gathered
from latentdiff.learning.trained import Trained
from latentdiff.memory import keep_freed_memory

_PATIENCE = timedelta(hours=6)  # of processes, while the main one encodes or draws alone
_WHOLE_WEIGHTS = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.NO)


class Run:
    """One training run: its Accelerator, its folder, its records and its checkpoints.

    Nothing of the method is in here, and the loop is in `learning.loop`. The folder is this run's
    alone from `with Run(...) as run:` to the end of the block, or of the process.

    Args:
        may_split: whether the stage can do with weights that FSDP2 splits over the processes.
        may_shrink: whether the mean loss of smaller micro-batches is that of the whole.

    Raises:
        UserError: the folder cannot be written, another run has it, the batch does not divide, the
            launch splits weights that must be whole, or the extra `train` is not installed; from
            the end of the block: memory ran out in it.
    """

    def __init__(
        self,
        config: RunConfig,
        dry: bool = False,
        *,
        may_split: bool = False,
        may_shrink: bool = True,
    ) -> None:
        check_installed()
        check_launch()
        self.config = config
        self.dry = dry
        # no exchange inside a forward pass: one that runs out of memory there leaves none waiting
        alone = DistributedDataParallelKwargs(broadcast_buffers=False)
        patient = InitProcessGroupKwargs(timeout=_PATIENCE)
        self.accelerator = Accelerator(
            cpu=spreads_over_cpus(),
            mixed_precision=config.precision,
            kwargs_handlers=[alone, patient],
        )
        if self.device.type == "cpu":
            keep_freed_memory()
        self.main = self.accelerator.is_main_process
        self.out = config.out
        self.bad_steps = 0
        self.bad_in_a_row = 0
        self.signal = 0
        self._launcher = os.getppid() if LAUNCHED in os.environ else None
        self.split = may_split and self.accelerator.is_fsdp2
        kind = self.accelerator.distributed_type
        if kind not in _WHOLE_WEIGHTS and not self.split:
            raise refuse_split(kind.value)
        if config.precision == "fp16" and self.device.type == "cpu":
            raise UserError("precision fp16 is for GPUs: set precision: bf16 or no")
        if self.split:  # autocast casts where it should; FSDP2 would round times and gradients, too
            plugin = self.accelerator.state.fsdp_plugin
            assert plugin is not None
            plugin.mixed_precision_policy = MixedPrecisionPolicy()
        optim, world = config.optim, self.accelerator.num_processes
        if optim.batch_size % (optim.accumulation * world):
            raise UserError(
                f"optim.batch_size {optim.batch_size} is not a multiple of optim.accumulation "
                f"{optim.accumulation} x {world} processes"
            )
        micro = optim.batch_size // (optim.accumulation * world)
        self.accumulation = Accumulation(
            self.accelerator, micro, split=self.split, shrinks=may_shrink
        )
        on_cpu = self.device.type == "cpu"
        lines = overridden(config.precision), crowded() if on_cpu else None
        self.say(*(line for line in lines if line is not None))
        self.records: Records | None = None
        self._lock: TextIO | None = None

    def __enter__(self) -> Self:
        if self.main:
            try:
                make_folder(self.out)
                self._lock = (self.out / ".lock").open("w")
                # of the process, freed at its death; a child such as a loader has no part in it
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                sweep(self.out)
                if (saves := self.out / "checkpoints").is_dir():
                    sweep(saves)  # a run that was killed at the end of its last save saves no more
            except BlockingIOError:
                raise UserError(
                    f"another run is writing to {self.out}: name another `out`"
                ) from None
            except OSError as error:
                raise UserError(f"cannot write to {self.out}: {error.strerror}") from None
        self.accelerator.wait_for_everyone()  # none touches the folder before it is this run's
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self.records is not None:
                self.records.close()
        finally:
            if self._lock is not None:
                self._lock.close()
        if kind is None:
            self.accelerator.end_training()
        if error is not None and is_out_of_memory(error):
            raise UserError(
                "out of memory, where no smaller batch helps: free what other programs hold, lower "
                "data.size, set precision: bf16 or train fewer weights; the same command then goes "
                "on from the last checkpoint"
            ) from error

    def _keep_config(self) -> None:
        """The resolved configuration in the folder, and the one before it, which it replaces."""
        text = dump_config(self.config)
        kept = self.out / "config.yaml"
        if kept.exists() and (self.dry or kept.read_text() == text):
            return
        if kept.exists():
            write_text(self.out / "config.previous.yaml", kept.read_text(), replace=True)
        write_text(kept, text, replace=True)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    def say(self, *lines: str) -> None:
        """Lines to the person, from the main process, without breaking the bar."""
        for line in lines if self.main else ():
            tqdm.write(line)

    def shown(self, bundle: Bundle, module: Conditioned) -> Shown:
        """The model as a whole, whatever becomes of `module` when Accelerate prepares it."""
        return Shown(bundle, module, self.device, split=self.split, main=self.main)

    def resume(self) -> tuple[dict[str, Tensors], dict[str, object]] | None:
        """The newest whole checkpoint of this run's folder, or None; opens the records there.

        Raises:
            UserError: none is whole, or it is of a run with other settings; see `check_settings`.
        """
        found = load_newest(self.out / "checkpoints", self.say)
        state = {} if found is None else found[1]
        self.bad_steps, self.bad_in_a_row, start = (
            int(str(state.get(name, 0))) for name in ("bad_steps", "bad_in_a_row", "step")
        )
        other = check_settings(self.config, state.get("settings"), start)
        room = state.get("room")
        if self.accumulation.shrinks and isinstance(room, int):
            self.accumulation.room = room
            self.accumulation.micro = min(room, self.accumulation.micro)
        scaler = state.get("scaler")
        if self.accelerator.scaler is not None and isinstance(scaler, dict):
            self.accelerator.scaler.load_state_dict(scaler)
        if self.main:
            self._keep_config()
            self.records = Records(self.out, start)
        if found is not None:
            self.say(f"resuming {self.out} at step {start}" + (f", {other}" if other else ""))
        return found

    def save(self, step: int, tensors: dict[str, Tensors], state: dict[str, object]) -> None:
        """Write a checkpoint from the main process, of what all processes hold.

        A dry run writes one to see that it can, and leaves none, which would bind the runs to come
        to its settings.
        """
        tensors = {name: self._collect(group) for name, group in tensors.items()}
        if self.main:
            size = sum(t.nbytes for group in tensors.values() for t in group.values())
            free = shutil.disk_usage(self.out).free
            if self.dry:
                most = (self.config.keep_checkpoints + 1) * size
                self.say(f"checkpoints take up to {most / 2**20:.1f} MiB of {free >> 20} free")
            if free < 2 * size:
                raise UserError(f"{self.out}: {free >> 20} MiB free, {size >> 19} needed to save")
            if self.records is not None:
                self.records.sync()
            scaler = self.accelerator.scaler
            root = self.out / ("dry-run" if self.dry else "checkpoints")
            save_checkpoint(
                root,
                step,
                tensors,
                {
                    **state,
                    "bad_steps": self.bad_steps,
                    "bad_in_a_row": self.bad_in_a_row,
                    "room": self.accumulation.room,
                    "settings": settings_of(self.config),
                    "scaler": None if scaler is None else scaler.state_dict(),
                },
                self.config.keep_checkpoints,
            )
            if self.dry:
                shutil.rmtree(root)
        self.accelerator.wait_for_everyone()

    def _collect(self, group: Tensors) -> Tensors:
        """Tensors as a whole, for the main process; split ones by way of the computer's memory."""
        if not self.split:
            return group
        found: Tensors = {}
        for name, tensor in group.items():
            whole = gathered(tensor)
            if self.main:
                found[name] = whole.cpu()
        return found

    def gradients(
        self,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        share: Sequence[Item],
        terms: Terms[Item],
    ) -> dict[str, Tensor]:
        """Gradients of the mean loss over the global batch, and the mean of every term.

        See `Accumulation.gradients`: the micro-batches given to `terms` shrink where memory is
        short, and the step is computed again.
        """
        before = self.accumulation.micro
        means = self.accumulation.gradients(modules, parameters, share, terms, self._noted())
        if self.accumulation.micro < before:
            now = self.accumulation.micro
            self.say(f"out of memory: micro-batches of {now} instead of {before}; losses stay")
        return means

    def optimize(self, step: int, networks: Sequence[Trained]) -> bool:
        """Clip and step if all gradients are finite; otherwise skip, count, give up after many.

        Args:
            step: its number, which the learning rates depend on.
            networks: those that take this step; the gradients of each are clipped together.

        Returns:
            Whether the step was taken.

        Raises:
            UserError: in `max_bad_steps` steps in a row the gradients were not finite.
        """
        norms = [
            self.accelerator.clip_grad_norm_(one.parameters, one.optim.clip) for one in networks
        ]
        good = all(
            norm is None or bool(torch.isfinite(gathered(torch.as_tensor(norm)))) for norm in norms
        )
        for one in networks:
            for group in one.optimizer.param_groups:
                group["lr"] = one.rate(step) * group.get("factor", 1.0)
            if good or self.accelerator.scaler is not None:  # which skips by itself, and adapts
                one.optimizer.step()
        self.bad_steps += not good
        self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise UserError(
                f"{self.bad_in_a_row} steps in a row gave NaN or infinite gradients: lower "
                f"optim.lr or set precision: no; the last checkpoint in {self.out} is good"
            )
        return good

    def record(self, step: int, values: dict[str, float]) -> None:
        """Scalars to TensorBoard and to `log.jsonl`."""
        if self.records is not None:
            self.records.scalars(step, values)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """A PNG grid into the run's `pictures` folder and to TensorBoard; a dry run keeps none."""
        if self.records is not None and not self.dry:
            self.records.picture(step, name, image)

    @property
    def stopping(self) -> int:
        """The signal to stop for, on which all processes agree, or 0. Read it once a step."""
        alone = self.accelerator.num_processes == 1
        return self._noted() if alone else self.accumulation.signal

    def _noted(self) -> int:
        """The signal that this process has noted, or 0.

        The launcher of one process passes no signal on and dies of it. That its child has another
        parent then stands for the signal.
        """
        if not self.signal and self._launcher not in (None, os.getppid()):
            self.signal = signal.SIGTERM
            with suppress(OSError):  # its terminal may be gone, too
                os.write(2, b"\nthe launcher has ended: stopping after this step\n")
        return self.signal

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT are noted, to be honoured at a step's end; a second exits at once.

        Raises:
            SystemExit: one came after the last step's end, while the block drew or measured.
        """

        def note(number: int, frame: FrameType | None) -> None:
            if self.signal:
                os._exit(128 + number)
            self.signal = number
            if self.main:  # no print: the signal may have come in the middle of one
                os.write(2, b"\nstopping after this step; once more to stop at once\n")

        before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {
            number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        (stopping,) = self.accumulation.agreed(self._noted())
        if stopping:
            raise SystemExit(128 + stopping)

    def bar(self, start: int, stop: int) -> tqdm:
        """The progress bar of the loop, on the main process."""
        return tqdm(
            initial=start, total=stop, unit="step", disable=not self.main, dynamic_ncols=True
        )

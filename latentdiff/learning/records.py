"""Records of a run: `log.jsonl`, TensorBoard and sample pictures."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

from latentdiff.errors import UserError
from latentdiff.files import make_folder, sync, write_text
from latentdiff.pictures import save_png


def check_installed() -> None:
    """Check before a run starts that the packages for its records are installed.

    Raises:
        UserError: the extra `train` is not installed.
    """
    if find_spec("tensorboard") is None:
        raise UserError("training needs more packages: pip install 'latentdiff[train]'")


class Records:
    """The records of a run's folder, as those of one uninterrupted run.

    Args:
        step: the step at which the run goes on. What a killed run recorded after it is dropped,
            for it comes again; what it recorded at it and comes again is kept once.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.step = step
        self.log = folder / "log.jsonl"
        self.kept: set[frozenset[str]] = set()  # names in each line of the step
        with _writing(folder):
            if self.log.exists():
                self._rewind(step)
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def _rewind(self, step: int) -> None:
        kept = [line for line in self.log.read_text().splitlines() if _step_of(line) <= step]
        self.kept = {frozenset(json.loads(line)) for line in kept if _step_of(line) == step}
        write_text(self.log, "".join(f"{line}\n" for line in kept), replace=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """A line of `log.jsonl`, where NaN and infinity are null, and points in TensorBoard."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": step, **finite}
        with _writing(self.log):
            if step > self.step or frozenset(line) not in self.kept:
                with self.log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """A PNG grid into `pictures` and to TensorBoard."""
        folder = self.folder / "pictures"
        target = folder / f"{name}-{step:08d}.png"
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        make_folder(folder)
        save_png(image, target, replace=True)  # a resumed run draws the same step again
        with _writing(self.folder / "tensorboard"):
            self.board.add_image(
                name, pixels.view(image.height, image.width, 3), step, dataformats="HWC"
            )

    def sync(self) -> None:
        """Have all lines so far on the disk, before a checkpoint that comes after them."""
        if self.log.exists():
            sync(self.log)

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        with _writing(self.folder / "tensorboard"):
            self.board.close()


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None


def _step_of(line: str) -> float:
    """The step of a line; infinity for one that a kill or a full disk cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf

"""Composed pictures made by several processes into memory that they share."""

import mmap
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
from PIL import Image

from latentdiff.data.composition import Composer, Thing, describe
from latentdiff.data.cutouts import transparency
from latentdiff.data.wordnet import WordNet
from latentdiff.pictures import open_picture

BLOCK = 256
"""Pictures that one process makes before they are announced."""

# Linux's MAP_NORESERVE: memory is taken when it is written to.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def shared(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """An array of zeros that forked processes write to and this one sees."""
    count = int(np.prod(shape))
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE
    memory = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize), flags)
    return np.frombuffer(memory, dtype, count).reshape(shape)


def read_all(
    root: Path,
    rows: Sequence[Mapping[str, object]],
    words: WordNet | None,
    size: int,
    workers: int,
) -> tuple[list[Thing], np.ndarray, np.ndarray]:
    """Read things as `composition.read_things` does, by several processes."""
    pictures = shared((len(rows), size, size, 3), np.uint8)
    alphas = shared((len(rows), size, size), np.uint8)

    def read(part: range, found: "multiprocessing.SimpleQueue[list[Thing]]") -> None:
        things: list[Thing] = []
        for number in part:
            image = open_picture(root / str(rows[number]["file_name"]))
            pictures[number] = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
            alphas[number] = transparency(pictures[number])
            things.append(describe(number, rows[number], pictures[number], alphas[number], words))
        found.put(things)

    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    parts = [range(at, len(rows), workers) for at in range(workers)]
    processes = [fork.Process(target=read, args=(part, queue), daemon=True) for part in parts]
    for process in processes:
        process.start()
    things = [thing for _ in processes for thing in queue.get()]
    for process in processes:
        process.join()
    return sorted(things, key=lambda thing: thing.row), pictures, alphas


class Pool:
    """`count` samples of a composer and their captions in tokens, made meanwhile.

    Make it before CUDA is used: its processes are forks. Sample i is a function of the composer's
    seed and i, however many processes there are.

    Attributes:
        pictures: uint8 [N, H, W, 3]; those of `done` blocks are ready.
        tokens: int16 [N, window].
    """

    def __init__(
        self,
        composer: Composer,
        encode: Callable[[list[str]], np.ndarray],
        count: int,
        window: int,
        workers: int,
    ) -> None:
        side = composer.pictures.shape[1]
        self.blocks = count // BLOCK
        self.pictures = shared((self.blocks * BLOCK, side, side, 3), np.uint8)
        self.tokens = shared((self.blocks * BLOCK, window), np.int16)
        self.done = shared((self.blocks,), np.uint8)
        self.stopped = shared((1,), np.uint8)
        self.processes: list[ForkProcess] = []
        fork = multiprocessing.get_context("fork")

        parent = os.getpid()

        def make(first: int) -> None:
            os.nice(10)  # whoever waits for the pictures trains meanwhile
            for block in range(first, self.blocks, workers):
                if self.stopped[0] or os.getppid() != parent:
                    return
                captions: list[str] = []
                for number in range(block * BLOCK, (block + 1) * BLOCK):
                    self.pictures[number], caption, _ = composer.sample(number)
                    captions.append(caption)
                self.tokens[block * BLOCK : (block + 1) * BLOCK] = encode(captions)
                self.done[block] = 1

        for first in range(workers):
            process = fork.Process(target=make, args=(first,), daemon=True)
            process.start()
            self.processes.append(process)

    def ready(self) -> np.ndarray:
        """The blocks that are made."""
        return np.flatnonzero(self.done)

    def stop(self) -> None:
        """Let each process finish its block, and wait for them."""
        self.stopped[0] = 1
        for process in self.processes:
            process.join()

"""Loading of a picture folder into the micro-batches of a step."""

import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentdiff.data.cache import LatentCache
from latentdiff.data.examples import Example, balanced_weights, load_picture
from latentdiff.data.folder import read_folder, read_parts
from latentdiff.errors import UserError
from latentdiff.learning.config import DataConfig
from latentdiff.learning.order import Key, SampleOrder, Shares, Stream, generator
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.identity import weights_hash

MEMORY = 2**30  # bytes of decoded pictures that a process keeps


def split_examples(data: DataConfig) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples of a folder.

    With `data.held_out` a filter names the second part; otherwise a fixed random fraction of the
    folder is held out.
    """
    chosen = {key: tuple(values) for key, values in data.where.items()}
    if data.held_out:
        held = {key: tuple(values) for key, values in {**data.where, **data.held_out}.items()}
        train, held_out = read_parts(data.root, [chosen, held])
        return train, held_out
    train = read_folder(data.root, where=chosen)
    count = round(len(train) * data.held_out_fraction)
    random = generator(0, Stream.HELD_OUT, 0, 0)
    out = set(random.permutation(len(train))[:count].tolist())
    kept = [example for number, example in enumerate(train) if number not in out]
    if not kept:
        raise UserError(f"{data.root}: no picture is left for training")
    return kept, [train[number] for number in sorted(out)]


def sample_order(examples: list[Example], data: DataConfig, seed: int) -> SampleOrder:
    """The run's order, balanced over `data.balance` groups where that is asked for."""
    weights = balanced_weights(examples, tuple(data.balance)) if data.balance else None
    return SampleOrder(len(examples), seed, weights)


class PictureSet(Dataset[tuple[Tensor | UserError, Key]]):
    """Decoded pictures [3, S, S] uint8 by key; the latest `MEMORY` bytes of them are kept.

    One that cannot be read is its error, so that it reaches the person in one line from any worker.
    """

    def __init__(self, examples: list[Example], size: int) -> None:
        self.examples = examples
        self.size = size
        self.load = lru_cache(MEMORY // (3 * size**2))(self._load)

    def _load(self, number: int) -> Tensor:
        return load_picture(self.examples[number], self.size)

    def parts(self, most: int) -> Iterator[Tensor]:
        """All pictures in their order, `most` at a time: float32 [B, 3, S, S] in [-1, 1].

        Raises:
            UserError: one of them cannot be read.
        """
        count = len(self.examples)
        for first in range(0, count, most):
            numbers = range(first, min(first + most, count))
            yield to_range(torch.stack([self.load(number) for number in numbers]))

    def __getitem__(self, index: Key) -> tuple[Tensor | UserError, Key]:
        try:
            return self.load(index[2]), index
        except UserError as error:
            return error, index


def to_range(pictures: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return pictures.float().div_(127.5).sub_(1.0)


def shares_of_pictures(
    dataset: PictureSet, shares: Shares, workers: int
) -> Iterator[list[tuple[Tensor, Key]]]:
    """This process's pictures of each step, decoded ahead by `workers` processes.

    Raises:
        UserError: a picture of the step cannot be read.
    """
    ahead = DataLoader(
        dataset,
        batch_sampler=shares,
        collate_fn=_together,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
    )
    for batch in ahead:
        if isinstance(batch, UserError):
            raise batch
        yield list(zip(*batch, strict=True))


def _together(
    items: Sequence[tuple[Tensor | UserError, Key]],
) -> tuple[Tensor, list[Key]] | UserError:
    """One tensor for a step: each that leaves a worker holds an open file while it lives, and the
    pictures that a worker keeps live long."""
    pictures: list[Tensor] = []
    for picture, _ in items:
        if isinstance(picture, UserError):
            return picture
        pictures.append(picture)
    return torch.stack(pictures), [key for _, key in items]


def _ignore_signals(worker: int) -> None:
    """Signals to the whole group are the run's to answer; a worker ends when its run does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def latent_cache(autoencoder: Autoencoder, size: int, folder: Path) -> LatentCache:
    """The cache of mean and std of pictures' raw latents, that `encode_pictures` reads."""
    return LatentCache(
        folder,
        weights_hash(autoencoder.module.state_dict()),
        f"centre square of {size} px; mean and std",
    )


def encode_pictures(
    autoencoder: Autoencoder,
    examples: list[Example],
    size: int,
    folder: Path,
    accelerator: Accelerator,
) -> Tensor:
    """Mean and std of every picture's raw latents, [N, 2C, h, w] float32 on the CPU.

    They are kept under `folder` and read from there the next time. Each process encodes its part.
    """
    cache = latent_cache(autoencoder, size, folder)

    def encode(part: list[Example], progress: bool) -> Tensor:
        return cache.latents(
            part,
            lambda example: load_picture(example, size),
            lambda pictures: autoencoder.moments(to_range(pictures)),
            progress=progress,
        )

    world = accelerator.num_processes
    if world > 1:
        encode(examples[accelerator.process_index :: world], accelerator.is_main_process)
        accelerator.wait_for_everyone()
    return encode(examples, accelerator.is_main_process)

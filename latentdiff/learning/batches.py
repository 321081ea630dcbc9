"""From a picture folder to the micro-batches of a step."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentdiff.data.cache import LatentCache, weights_hash
from latentdiff.data.folder import (
    Example,
    balanced_weights,
    load_picture,
    read_folder,
)
from latentdiff.errors import UserError
from latentdiff.learning.config import DataConfig
from latentdiff.learning.order import MicroBatches, SampleOrder, generator
from latentdiff.models.vae import VAE, encode_moments

Key = tuple[int, int, int]


def split_examples(data: DataConfig) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples of a folder.

    With `data.held_out` a filter names the second part; otherwise a fixed random fraction of the
    folder is held out.
    """
    chosen = {key: tuple(values) for key, values in data.where.items()}
    train = read_folder(data.root, where=chosen)
    if data.held_out:
        held = {key: tuple(values) for key, values in {**data.where, **data.held_out}.items()}
        return train, read_folder(data.root, where=held)
    count = round(len(train) * data.held_out_fraction)
    out = set(generator(0).permutation(len(train))[:count].tolist())
    kept = [example for number, example in enumerate(train) if number not in out]
    if not kept:
        raise UserError(f"{data.root}: no picture is left for training")
    return kept, [train[number] for number in sorted(out)]


def sample_order(examples: list[Example], data: DataConfig, seed: int) -> SampleOrder:
    """The run's order, balanced over `data.balance` groups where that is asked for."""
    weights = balanced_weights(examples, tuple(data.balance)) if data.balance else None
    return SampleOrder(len(examples), seed, weights)


class PictureSet(Dataset[tuple[Tensor, Key]]):
    """Decoded pictures [3, S, S] uint8 by (step, place, sample); each is decoded once and kept."""

    def __init__(self, examples: list[Example], size: int) -> None:
        self.examples = examples
        self.load = cache(lambda number: load_picture(examples[number], size))

    def __getitem__(self, index: Key) -> tuple[Tensor, Key]:
        return self.load(index[2]), index


def to_range(pictures: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return pictures.float().div_(127.5).sub_(1.0)


def collate(items: list[tuple[Tensor, Key]]) -> tuple[Tensor, list[Key]]:
    """Stack pictures into [B, 3, S, S]; keys stay a list."""
    return torch.stack([picture for picture, _ in items]), [key for _, key in items]


def loader(dataset: PictureSet, batches: MicroBatches) -> DataLoader[tuple[Tensor, Key]]:
    """A loader that follows `batches`."""
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate)


def encode_pictures(
    vae: VAE, examples: list[Example], size: int, folder: Path, device: torch.device
) -> Tensor:
    """Mean and std of every picture's raw latents, [N, 2C, h, w] float32 on the CPU.

    They are kept under `folder` and read from there the next time.
    """
    cache = LatentCache(
        folder, weights_hash(vae.state_dict()), f"centre square of {size} px; mean and std"
    )
    return cache.latents(
        examples,
        lambda example: load_picture(example, size),
        lambda pictures: encode_moments(vae, to_range(pictures).to(device)),
    )

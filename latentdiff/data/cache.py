"""Disk cache of encoded pictures and captions.

A latent is keyed by the sha256 of its picture's file, the states of a caption by the sha256 of its
tokens. The folder is named by the encoder's weights and the transform (or the padding), so a change
of either never reads stale entries. A shard is named by the sha256 of its own bytes: a damaged one
is noticed, and its entries are encoded again.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from latentdiff.data.examples import Example
from latentdiff.errors import UserError
from latentdiff.files import make_folder, write_bytes
from latentdiff.models.text_encoders import TextStates, Tokens

SHARD = 1024  # entries in a file, and what an interruption can cost

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TensorCache:
    """Tensors under `folder`, by key, of one `maker`: a text that says all else they depend on."""

    folder: Path
    maker: str

    def fetch(
        self,
        keys: Sequence[str],
        make: Callable[[list[int]], Iterable[Tensor]],
        *,
        batch_size: int = 64,
        what: str = "encoding",
        progress: bool = True,
    ) -> list[Tensor]:
        """One tensor for each key, on the CPU, from disk where it is there.

        Args:
            make: places in `keys`, at most `batch_size`, -> a tensor for each.

        Raises:
            UserError: the cache cannot be written.
        """
        known = self._read()
        places = {key: place for place, key in reversed(list(enumerate(keys)))}
        missing = [key for key in dict.fromkeys(keys) if key not in known]
        bar = tqdm(total=len(missing), desc=what, disable=not (progress and missing), leave=False)
        with bar, torch.no_grad():
            for start in range(0, len(missing), SHARD):
                shard: dict[str, Tensor] = {}
                part = missing[start : start + SHARD]
                for batch in (part[i : i + batch_size] for i in range(0, len(part), batch_size)):
                    made = [_own(one) for one in make([places[key] for key in batch])]
                    shard.update(zip(batch, made, strict=True))
                    bar.update(len(batch))
                self._write(shard)
                known.update(shard)
        return [known[key] for key in keys]

    def put(self, entries: dict[str, Tensor]) -> None:
        """Keep tensors under their keys, in one file.

        Raises:
            UserError: it cannot be written.
        """
        self._write(entries)

    @property
    def _shards(self) -> Path:
        return self.folder / hashlib.sha256(self.maker.encode()).hexdigest()[:32]

    def _read(self) -> dict[str, Tensor]:
        known: dict[str, Tensor] = {}
        for path in sorted(self._shards.glob("*.safetensors")):
            try:
                data = path.read_bytes()
            except FileNotFoundError:  # somebody empties the cache just now
                continue
            if hashlib.sha256(data).hexdigest() == path.stem:
                known.update(load(data))
            else:
                _log.warning("%s is damaged: what it held is encoded again", path)
                path.unlink(missing_ok=True)
        return known

    def _write(self, shard: dict[str, Tensor]) -> None:
        data = save(shard)
        target = self._shards / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        make_folder(target.parent)
        try:
            write_bytes(target, data, replace=True)  # of the same bytes, by its name
        except UserError:
            if target.parent.exists():
                raise
            make_folder(target.parent)  # it was deleted in between
            write_bytes(target, data, replace=True)


@dataclass(frozen=True, slots=True)
class LatentCache:
    """Latents under `folder` of the encoder whose `weights_hash` is `weights`.

    `transform` says in words all else that decides a latent: size, crop, flip, type.
    """

    folder: Path
    weights: str
    transform: str

    @property
    def tensors(self) -> TensorCache:
        """The cache itself, whose keys are the sha256 of pictures' files."""
        return TensorCache(self.folder, f"{self.weights}\n{self.transform}")

    def latents(
        self,
        examples: Sequence[Example],
        load_picture: Callable[[Example], Tensor],
        encode: Callable[[Tensor], Tensor],
        *,
        batch_size: int = 64,
        progress: bool = True,
    ) -> Tensor:
        """One latent for each example: [N, ...] on the CPU, from disk where it is there.

        Args:
            load_picture: example -> uint8 [3, H, W].
            encode: uint8 [B, 3, H, W] -> [B, ...], deterministic (moments or their mean, no draw).

        Returns:
            [N, ...]; of no examples, [0].

        Raises:
            UserError: a picture cannot be read, or the cache cannot be written.
        """
        if not examples:  # a process's part of fewer pictures than there are processes
            return torch.empty(0)
        return torch.stack(
            self.tensors.fetch(
                [hashlib.sha256(example.read()).hexdigest() for example in examples],
                lambda places: encode(torch.stack([load_picture(examples[i]) for i in places])),
                batch_size=batch_size,
                what="latents",
                progress=progress,
            )
        )


@dataclass(frozen=True, slots=True)
class TextCache:
    """States of captions under `folder`, of the text tower whose `weights_hash` is `weights`.

    `padding` says in words what fills a caption's tokens up, and how far: towers may see it.
    """

    folder: Path
    weights: str
    padding: str

    def states(
        self, tokens: Tokens, encode: Callable[[Tokens], TextStates], *, progress: bool = True
    ) -> list[Tensor]:
        """Read or encode the states of each caption that the denoiser may attend to.

        Each is [L, D] on the CPU; L differs between captions where a tower masks its padding. Where
        there is a pooled vector, each is its states and that behind them, [L D + P].

        Raises:
            UserError: the cache cannot be written.
        """
        keys = [
            hashlib.sha256(ids[kept].numpy().tobytes()).hexdigest()
            for ids, kept in zip(tokens.ids, tokens.mask, strict=True)
        ]

        def make(places: list[int]) -> list[Tensor]:
            cut = [tokens.cut[place] for place in places]
            found = encode(Tokens(tokens.ids[places], tokens.mask[places], cut))
            rows = list(found.states)
            if found.mask is not None:
                rows = [row[seen] for row, seen in zip(rows, found.mask, strict=True)]
            if found.pooled is None:
                return rows
            both = zip(rows, found.pooled, strict=True)
            return [torch.cat([row.flatten(), pooled]) for row, pooled in both]

        cache = TensorCache(self.folder, f"{self.weights}\ntext states\n{self.padding}")
        return cache.fetch(keys, make, what="captions", progress=progress)


def _own(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares no memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

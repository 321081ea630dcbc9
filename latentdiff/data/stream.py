"""Shards that are too many for the disk: fetched when their turn comes, and removed after it."""

import hashlib
import shutil
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import cast
from urllib.error import URLError
from urllib.request import urlopen

from latentdiff.data.examples import Example
from latentdiff.data.shards import INDEX, list_shards, shards_of
from latentdiff.errors import UserError
from latentdiff.files import make_folder, write_scratch
from latentdiff.reading import decode, parse_json, read_bytes, reason

_TRIES = 3
_MAX_INDEX = 64 * 2**20
_MAX_SHARD = 8 * 2**30  # it passes through memory
_MAX_SAMPLES = 10**9  # in a shard


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard: its path or URL, its number of samples, and its sha256 if the index gives one."""

    place: str
    samples: int
    sha256: str | None = None


def find_shards(pattern: str) -> list[Shard]:
    """The shards of a folder, or of a pattern of paths or http(s) addresses, from the `index.json`
    beside them.

    Without an index, shards on a disk are counted; that reads their headers.

    Raises:
        UserError: an address has no index, the index is faulty, or a shard is not in it.
    """
    places = [_address(path) for path in shards_of(Path(pattern))]
    folder = places[0].rpartition("/")[0]
    index = f"{folder}/{INDEX}" if folder else INDEX
    if not _remote(places[0]) and not Path(index).is_file():
        return [Shard(place, len(list_shards(Path(place)))) for place in places]
    try:
        content = parse_json(decode(_read(index, _MAX_INDEX)))
        rows = cast(dict[str, list[dict[str, object]]], content)["shards"]
        known = {str(row["name"]): (_count(row["samples"]), str(row["sha256"])) for row in rows}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is no index of shards ({error!r:.200})") from None
    names = [place.rpartition("/")[2] for place in places]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{index} does not have {unknown[0]}")
    return [Shard(place, *known[name]) for place, name in zip(places, names, strict=True)]


def _count(value: object) -> int:
    """The samples of a shard.

    Raises:
        ValueError: it is no whole number of them.
    """
    if not isinstance(value, int) or not 1 <= value <= _MAX_SAMPLES:
        raise ValueError(f"samples: {value!r:.40} is no number of samples")
    return value


class ShardStream:
    """Examples by sample number, counted through the shards in their order.

    Args:
        folder: folder for fetched shards, of this process alone; its content is removed.
        keep: number of shards kept on disk at a time.
    """

    def __init__(self, shards: list[Shard], folder: Path, keep: int) -> None:
        self.shards = shards
        self.folder = folder
        self.keep = keep
        self.starts = [0]
        for shard in shards:
            self.starts.append(self.starts[-1] + shard.samples)
        self.at_hand: OrderedDict[int, list[Example]] = OrderedDict()
        shutil.rmtree(folder, ignore_errors=True)

    def __getitem__(self, sample: int) -> Example:
        """A sample, whose shard is fetched if it is not at hand.

        Raises:
            UserError: the shard cannot be fetched, is damaged, or is not as its index says.
        """
        shard = bisect_right(self.starts, sample) - 1
        return self.of_shard(shard)[sample - self.starts[shard]]

    def of_shard(self, shard: int) -> list[Example]:
        """Every sample of a shard."""
        if shard not in self.at_hand:
            while len(self.at_hand) >= self.keep:
                gone, _ = self.at_hand.popitem(last=False)
                self._path(gone).unlink(missing_ok=True)
            self.at_hand[shard] = self._list(shard)
        self.at_hand.move_to_end(shard)
        return self.at_hand[shard]

    def _path(self, shard: int) -> Path:
        """Name the local file of a fetched shard; one that is on disk already stays in place."""
        return self.folder / f"{shard:08}.tar"

    def _list(self, number: int) -> list[Example]:
        shard, path = self.shards[number], Path(self.shards[number].place)
        if _remote(shard.place):
            path = self._path(number)
            data = _read(shard.place, _MAX_SHARD)
            if shard.sha256 is not None and hashlib.sha256(data).hexdigest() != shard.sha256:
                raise UserError(f"{shard.place} does not match the sha256 of its index")
            make_folder(path.parent)
            write_scratch(path, data)
        examples = list_shards(path)
        if len(examples) != shard.samples:
            raise UserError(f"{shard.place} has {len(examples)} samples, not {shard.samples}")
        if faulty := [example for example in examples if example.fault]:
            raise UserError(f"{shard.place}: {faulty[0].fault}")
        if bare := [example for example in examples if not example.captions]:
            raise UserError(f"{shard.place}: {bare[0].fields['file_name']} has no caption")
        return examples


def _remote(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _address(path: Path) -> str:
    """A path, or an address, of which `Path` has dropped one slash."""
    text = str(path)
    for scheme in ("http", "https"):
        if text.startswith(f"{scheme}:/"):
            return f"{scheme}://{text.removeprefix(f'{scheme}:/').lstrip('/')}"
    return text


def _read(place: str, most: int, wait: Callable[[float], None] = time.sleep) -> bytes:
    """All of a file or an address, which is tried again when the connection breaks.

    Raises:
        UserError: it cannot be read, or an address sends more than `most` bytes.
    """
    if not _remote(place):
        try:
            return read_bytes(Path(place), most)
        except OSError as error:
            raise UserError(f"cannot read {place}: {reason(error)}") from None
    for attempt in range(_TRIES):
        try:
            with urlopen(place, timeout=60) as answer:
                data = answer.read(most + 1)
        except (URLError, HTTPException, OSError) as error:
            if attempt == _TRIES - 1:
                raise UserError(f"cannot fetch {place}: {error}") from None
            wait(2.0**attempt)
        else:
            if len(data) > most:
                raise UserError(f"{place} has more than {most:,} bytes")
            return data
    raise AssertionError

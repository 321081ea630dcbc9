"""What an encoder makes of pictures, kept on disk.

A latent is found again by the sha256 of its picture's file, in a folder named by the encoder's
weights and the transform: whatever changes, nothing stale can be read. A shard is named by the
sha256 of its own bytes, so damage is seen, and what was in it is encoded again.
"""

import contextlib
import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from latentdiff.data.folder import Example
from latentdiff.errors import UserError

SHARD = 1024  # latents in a file, and what an interruption can cost

_log = logging.getLogger(__name__)


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """sha256 of a state dict: names, types, shapes and every bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class LatentCache:
    """Latents under `folder` of the encoder whose `weights_hash` is `weights`.

    `transform` says in words all else that decides a latent: size, crop, flip, type.
    """

    folder: Path
    weights: str
    transform: str

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

        Raises:
            UserError: a picture cannot be read, or the cache cannot be written.
        """
        keys = [_picture_hash(example.path) for example in examples]
        known = self._read()
        missing = [key for key in dict.fromkeys(keys) if key not in known]
        by_key = dict(zip(keys, examples, strict=True))
        bar = tqdm(total=len(missing), desc="latents", disable=not (progress and missing))
        with bar, torch.no_grad():
            for start in range(0, len(missing), SHARD):
                shard: dict[str, Tensor] = {}
                part = missing[start : start + SHARD]
                for batch in (part[i : i + batch_size] for i in range(0, len(part), batch_size)):
                    pictures = torch.stack([load_picture(by_key[key]) for key in batch])
                    encoded = encode(pictures).cpu()
                    shard.update(
                        zip(
                            batch,
                            (one.clone(memory_format=torch.contiguous_format) for one in encoded),
                            strict=True,
                        )
                    )
                    bar.update(len(batch))
                self._write(shard)
                known.update(shard)
        return torch.stack([known[key] for key in keys])

    @property
    def _shards(self) -> Path:
        identity = f"{self.weights}\n{self.transform}".encode()
        return self.folder / hashlib.sha256(identity).hexdigest()[:32]

    def _read(self) -> dict[str, Tensor]:
        known: dict[str, Tensor] = {}
        for path in sorted(self._shards.glob("*.safetensors")):
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == path.stem:
                known.update(load(data))
            else:
                _log.warning("%s is damaged: its latents are encoded again", path)
                path.unlink()
        return known

    def _write(self, shard: dict[str, Tensor]) -> None:
        data = save(shard)
        target = self._shards / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        staged = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with staged.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(target)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError):
                staged.unlink()


def _picture_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot open picture {path}: {error.strerror or error}") from error

"""A picture folder into shards: `latentdiff.data.shards` reads them."""

import hashlib
import json
import tarfile
from io import BytesIO
from pathlib import Path

from latentdiff.data.examples import Example
from latentdiff.data.folder import read_folder
from latentdiff.data.shards import INDEX
from latentdiff.errors import UserError
from latentdiff.files import make_folder, writing_folder
from latentdiff.picture_formats import suffix_of
from latentdiff.pictures import MAX_BYTES


def write_shards(root: Path, out: Path, size: int) -> int:
    """Put a picture folder into `out/00000.tar`, ... of `size` samples; the number of shards.

    The files' bytes are as they were, and the same folder gives the same shards to the byte. A
    member's extension tells what the picture is, whatever its file was called.
    `index.json` has the samples, bytes and sha256 of each.

    Raises:
        UserError: the folder is faulty, a file is no picture or too large, `out` holds something,
            or cannot be written.
    """
    examples = read_folder(root)
    shards: list[dict[str, object]] = []
    make_folder(out.parent)
    with writing_folder(out, replace=False) as stage:
        for first in range(0, len(examples), size):
            part = examples[first : first + size]
            name = f"{first // size:05}.tar"
            data = _tar(first, part)
            (stage / name).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            sums: dict[str, object] = {"bytes": len(data), "sha256": digest}
            shards.append({"name": name, "samples": len(part), **sums})
        (stage / INDEX).write_text(json.dumps({"shards": shards}, indent=1))
    return len(shards)


def _tar(first: int, examples: list[Example]) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, example in enumerate(examples, start=first):
            fields = {"text": example.captions[0], **example.fields}
            picture = example.read()
            parts = {
                _extension(example, picture): picture,
                ".json": json.dumps(fields, default=str).encode(),
            }
            for extension, data in parts.items():
                member = tarfile.TarInfo(f"{number:09}{extension}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    return buffer.getvalue()


def _extension(example: Example, data: bytes) -> str:
    """Choose the file extension by the first bytes of a picture, as `open_picture` does."""
    if len(data) > MAX_BYTES:
        raise UserError(f"picture {example.name} has more than {MAX_BYTES} bytes")
    suffix = suffix_of(data)
    if suffix is None:
        raise UserError(f"{example.name} is no PNG, JPEG or WebP picture, nor a BMP or AVIF")
    return suffix

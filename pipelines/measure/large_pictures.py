"""What a large picture costs: the autoencoder in tiles, and a small region painted anew.

    python pipelines/measure/large_pictures.py tiles --width 1024 --height 768
    python pipelines/measure/large_pictures.py tiles --width 4000 --height 3000 --alone
    python pipelines/measure/large_pictures.py region --width 4000 --height 3000

`tiles` decodes a picture in tiles and at once, each in a process of its own, and compares them.
`region` paints a hole of 300 pixels and compares with a plain picture of the model; the peak is
that of the whole process, libraries and model included.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import interpolate

from latentdiff import Bundle, LatentDiffusionPipeline
from latentdiff.editing import Region, RePaint, box_mask
from latentdiff.files import write_bytes
from latentdiff.memory import keep_freed_memory
from latentdiff.pictures import open_picture, to_tensor

PHOTO = Path(__file__).parents[2] / "docs/pictures/photo.png"
SEAM = 384  # pixels between two seams, see `latentdiff.models.tiling`


def large(width: int, height: int) -> Image.Image:
    """The photo, enlarged, with grain: so large a picture is not in this repository."""
    photo = open_picture(PHOTO).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).integers(-8, 9, (height, width, 1), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(photo) + grain, 0, 255).astype(np.uint8))


def peak() -> float:
    """The most memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@torch.no_grad()
def decode_alone(width: int, height: int) -> None:
    """Decode smooth random latents in tiles, printing CPU seconds and the peak of memory."""
    autoencoder = Bundle.load(tiling="on").autoencoder
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, autoencoder.channels, 24, 32, generator=random)
    size = height // autoencoder.factor, width // autoencoder.factor
    latents = interpolate(coarse, size=size, mode="bilinear")
    start = time.process_time()
    shape = tuple(autoencoder.decode(latents).shape)
    seconds = time.process_time() - start
    print(f"decode {shape} in tiles: {seconds:.1f} CPU s, peak {peak():.2f} GB", flush=True)


@torch.no_grad()
def decode(width: int, height: int, tiling: str, to: Path) -> None:
    """Encode and decode a picture and keep it, printing the time and the peak of memory."""
    autoencoder = Bundle.load(tiling=tiling).autoencoder  # pyright: ignore[reportArgumentType]
    picture = to_tensor(large(width, height))[None]
    start = time.perf_counter()
    latents = autoencoder.encode(picture)
    middle = time.perf_counter()
    decoded = autoencoder.decode(latents)
    end = time.perf_counter()
    write_bytes(to, save({"decoded": decoded, "latents": latents}), replace=False)
    seconds = f"encode {middle - start:.1f} s, decode {end - middle:.1f} s"
    print(f"tiling {tiling}: {seconds}, peak {peak():.2f} GB", flush=True)


def tiles(width: int, height: int) -> None:
    """Compare tiles with the whole."""
    with tempfile.TemporaryDirectory() as folder:
        for tiling in ("on", "off"):
            of = ["--width", f"{width}", "--height", f"{height}", "--to", f"{folder}/{tiling}"]
            subprocess.run([sys.executable, __file__, "decode", tiling, *of], check=True)
        on, off = (load_file(f"{folder}/{tiling}") for tiling in ("on", "off"))
    levels = (on["decoded"].clamp(-1, 1) - off["decoded"].clamp(-1, 1)).abs() * 127.5
    print(f"latents differ by at most {(on['latents'] - off['latents']).abs().max():.1g}")
    print(f"pictures differ by at most {levels.max():.2g} of 255, at seams {at_seams(levels):.2g}")


def at_seams(levels: Tensor) -> float:
    """The largest of the pixels on both sides of a seam."""
    beside = [
        part
        for axis in (2, 3)
        for seam in range(SEAM, levels.shape[axis], SEAM)
        for part in [levels.narrow(axis, seam - 1, 2)]
    ]
    return max((float(part.max()) for part in beside), default=0.0)


def region(width: int, height: int, resamples: int) -> None:
    """Paint a hole of 300 pixels, and tell its time as a multiple of a plain picture's."""
    pipe = LatentDiffusionPipeline.from_pretrained(device="cpu")
    photo = large(width, height)
    x, y = width // 2, height // 2
    mask = box_mask(f"{x},{y},{x + 300},{y + 300}", photo.size)

    def plain() -> None:
        pipe("a cat face", seed=0, progress=False)

    def painted() -> Image.Image:
        part = Region.around(photo, mask, pipe.bundle.size)
        edits = [RePaint(part.image, part.mask, resamples=resamples)]
        return part.paste(pipe("a cat face", edits=edits, seed=0, progress=False).images[0])

    plain()
    result = painted()
    times: dict[str, list[float]] = {"plain": [], "region": []}
    for _ in range(5):
        for name, draw in (("plain", plain), ("region", painted)):
            start = time.perf_counter()
            draw()
            times[name].append(time.perf_counter() - start)
    before, after = np.asarray(photo), np.asarray(result)
    outside = np.asarray(mask) < 128
    a, b = (statistics.median(times[name]) for name in ("plain", "region"))
    print(f"plain picture {a:.2f} s, region of {width} x {height} {b:.2f} s: {b / a:.2f} times")
    print(f"pixels changed outside the hole: {int((before != after).any(2)[outside].sum())}")
    print(f"and inside: {(before != after).any(2)[~outside].mean():.0%}; peak {peak():.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a large picture costs.")
    parser.add_argument("what", choices=["tiles", "region", "decode"])
    parser.add_argument("tiling", nargs="?", default="on", help="of decode: on or off")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=768)
    parser.add_argument("--alone", action="store_true", help="decode in tiles alone")
    parser.add_argument("--resamples", type=int, default=1, help="RePaint's, of region")
    parser.add_argument("--to", type=Path, help="of decode: the file")
    given = parser.parse_args()
    keep_freed_memory()
    if given.what == "tiles" and given.alone:
        decode_alone(given.width, given.height)
    elif given.what == "tiles":
        tiles(given.width, given.height)
    elif given.what == "region":
        region(given.width, given.height, given.resamples)
    else:
        decode(given.width, given.height, given.tiling, given.to)


if __name__ == "__main__":
    main()

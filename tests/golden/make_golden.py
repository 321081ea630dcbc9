"""The golden picture of the bundled model: `python tests/golden/make_golden.py` draws it anew."""

from pathlib import Path

import torch
from torch import Tensor

from latentdiff import LatentDiffusionPipeline
from latentdiff.pictures import grid, save_png, to_pil

GOLDEN = Path(__file__).with_name("emoji128.png")
PROMPTS = ("a red heart", "a grinning face", "a rocket", "a slice of pizza")


def draw() -> Tensor:
    """The four pictures [4, 3, 128, 128] in [0, 1], at the default settings and seed 0."""
    pipe = LatentDiffusionPipeline.from_pretrained(device="cpu", dtype="float32")
    return pipe(PROMPTS, seed=0, output_type="pt", progress=False).images


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.unlink(missing_ok=True)
    save_png(grid([to_pil(picture * 2 - 1) for picture in draw()], 4), GOLDEN)

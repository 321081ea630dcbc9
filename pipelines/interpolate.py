"""The way from one prompt to another: one noise, and text states in between.

python pipelines/interpolate.py "a red heart" "a green apple" --out way.png
"""

import argparse
from pathlib import Path

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.pictures import grid, save_png, to_pil
from latentdiff.pipeline.interpolation import between_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the way from one prompt to another.")
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--number", type=int, default=7, help="how many pictures, with both ends")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("way.png"))
    given = parser.parse_args()
    weights = [k / max(1, given.number - 1) for k in range(given.number)]
    try:
        drawn = between_prompts(
            LatentDiffusionPipeline.from_pretrained(given.model),
            given.a,
            given.b,
            weights,
            seed=given.seed,
        )
        print(save_png(grid([to_pil(one * 2 - 1) for one in drawn], 8), given.out))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

"""A hole in a picture filled with what words say: RePaint.

python pipelines/inpaint.py face.png "a cat with sunglasses" --mask mask.png --out cat.png
"""

import argparse
from pathlib import Path

from latentdiff import LatentDiffusionPipeline, RePaint, UserError
from latentdiff.pictures import save_png


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill a hole in a picture.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--mask", type=Path, help="white: paint; default: what is transparent")
    parser.add_argument("--resamples", type=int, default=10, help="1 is plain replacement")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    given = parser.parse_args()
    try:
        edit = RePaint(given.picture, given.mask, resamples=given.resamples)
        output = LatentDiffusionPipeline.from_pretrained(given.model)(
            given.prompt,
            edits=[edit],  # others may follow it in the list
            num_inference_steps=given.steps,
            guidance_scale=given.guidance_scale,
            seed=given.seed,
        )
        print(save_png(output.images[0], given.out))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

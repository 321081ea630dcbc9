"""A picture with the coarse shapes and colours of another: ILVR.

python pipelines/ilvr.py sunset.png "a slice of pizza" --factor 4 --out pizza.png
"""

import argparse
from pathlib import Path

from latentdiff import ILVR, LatentDiffusionPipeline, UserError
from latentdiff.pictures import save_png


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep the low frequencies of a reference.")
    parser.add_argument("picture", type=Path, help="the reference")
    parser.add_argument("prompt")
    parser.add_argument("--factor", type=int, help="finer detail is free; default: 4 latents")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    given = parser.parse_args()
    try:
        edit = ILVR(given.picture, given.factor)
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

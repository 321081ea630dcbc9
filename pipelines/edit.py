"""A picture drawn anew as words say: SDEdit.

python pipelines/edit.py scribble.png "a red heart" --strength 0.6 --out heart.png
"""

import argparse
from pathlib import Path

from latentdiff import LatentDiffusionPipeline, SDEdit, UserError
from latentdiff.pictures import save_png


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a photo or a scribble anew.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--strength", type=float, default=0.6, help="0 keeps it, 1 ignores it")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    given = parser.parse_args()
    try:
        edit = SDEdit(given.picture, given.strength)
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

"""What a further prompt does to the sharpness of a model's pictures.

    python pipelines/measure/further_prompts.py

Prints, for each weight and guidance, the mean difference of neighbouring pixels in grey levels of
255 over the prompts. Scale 6 alone is as strong in all as scale 4 with a further prompt of weight
0.5, and scale 2.67 with it as strong as 4 alone.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from latentdiff import LatentDiffusionPipeline, UserError

PROMPTS = (
    "a red heart",
    "a grinning face",
    "a rocket",
    "a slice of pizza",
    "a cat face",
    "a green apple",
    "a sunflower",
    "a soccer ball",
)
FURTHER = "a hat"
SETTINGS: dict[str, dict[str, Any]] = {
    "scale 4": {},
    "scale 6": {"guidance_scale": 6.0},
    "weight 0.5": {"also": [(FURTHER, 0.5)]},
    "weight 0.5, scale 2.67": {"also": [(FURTHER, 0.5)], "guidance_scale": 8 / 3},
    "weight 0.5, apg": {"also": [(FURTHER, 0.5)], "guidance": "apg"},
    "weight 0.2": {"also": [(FURTHER, 0.2)]},
    "weight -0.5": {"also": [(FURTHER, -0.5)]},
}


def roughness(pictures: Tensor) -> float:
    """Mean difference of neighbours of pictures [B, 3, H, W] in [0, 1], in grey levels of 255."""
    steps = (pictures.diff(dim=2).abs(), pictures.diff(dim=3).abs())
    return 255 * float(torch.cat([step.flatten() for step in steps]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure further prompts on a model.")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    try:
        pipe = LatentDiffusionPipeline.from_pretrained(given.model, dtype="float32")
        print("| | grey levels |\n|---|---|")
        for name, settings in SETTINGS.items():
            call = {"guidance_scale": 4.0, "num_inference_steps": given.steps, **settings}
            output = pipe(list(PROMPTS), seed=0, output_type="pt", progress=False, **call)
            assert isinstance(output.images, Tensor)
            print(f"| {name} | {roughness(output.images):.1f} |", flush=True)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

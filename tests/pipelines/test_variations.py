"""Variations: noise turned towards other seeds, picture by picture, standard normal throughout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_bundle

from latentdiff import LatentDiffusionPipeline, Request, UserError
from latentdiff.cli import main
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.pictures import open_picture
from latentdiff.pipeline.arguments import varied

RUN: dict[str, Any] = {"num_inference_steps": 2, "progress": False, "output_type": "pt"}


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_varied_noise_is_standard_normal_and_as_like_the_first_as_it_says(strength: float) -> None:
    noise = NoiseStreams(0, count=4).draw((4, 200, 200))
    found = varied(noise, strength, [5, 6, 7, 8])
    alike = (found * noise).mean((1, 2, 3))
    expected = torch.cos(torch.tensor(strength) * torch.pi / 2)
    error = 5 / noise[0].numel() ** 0.5  # five standard errors of a mean
    assert (found.var((1, 2, 3)) - 1).abs().max() < 1.5 * error
    assert (alike - expected).abs().max() < error
    if strength:
        assert ((found[0] * found[1]).mean()).abs() < error


def test_a_variation_is_of_one_picture_and_the_same_in_every_batch() -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    asked: dict[str, Any] = {"variation_seed": 40, "variation_strength": 0.3, **RUN}
    three = pipe("a cat", seed=1, first=2, num_images_per_prompt=3, **asked)
    assert (three.seeds, three.indices, three.variation_seeds) == ([1] * 3, [2] * 3, [40, 41, 42])
    last: dict[str, Any] = asked | {"variation_seed": 42}
    alone = pipe("a cat", seed=1, first=2, **last)
    assert (three.images[2] - alone.images[0]).abs().max() < 1e-4
    assert (three.images[0] - three.images[1]).abs().max() > 1e-2
    both: dict[str, Any] = asked | {"variation_seed": [42, 40]}
    named = pipe(["a cat"] * 2, seed=[1, 9], first=2, **both)
    assert (named.images[0] - alone.images[0]).abs().max() < 1e-4
    off = pipe("a cat", seed=1, first=2, **RUN)
    assert off.variation_seeds == []
    strongest: dict[str, Any] = asked | {"variation_strength": 1.0}
    whole = pipe("a cat", seed=1, first=2, **strongest)
    assert torch.equal(whole.images, pipe("a cat", seed=40, **RUN).images)
    fresh = pipe("a cat", seed=1, variation_strength=0.5, **RUN)
    told: dict[str, Any] = {"variation_strength": 0.5, "variation_seed": fresh.variation_seeds}
    again = pipe("a cat", seed=1, **told, **RUN)
    assert torch.equal(fresh.images, again.images)


def test_variations_that_are_none_are_one_line() -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    wrong: list[dict[str, Any]] = [
        {"variation_strength": 1.5},
        {"variation_strength": float("nan")},
        {"variation_seed": 3},
        {"variation_seed": [1, 2], "variation_strength": 0.5},
        {"variation_seed": -7, "variation_strength": 0.5},
    ]
    for given in wrong:
        with pytest.raises(UserError, match=r"seed|strength"):
            pipe.prepare(Request(prompt="a cat", **given))


def test_the_command_varies_and_draws_each_again(tmp_path: Path) -> None:
    out = ["-o", str(tmp_path), "--model", str(tiny_bundle().save(tmp_path / "model"))]
    asked = ["generate", "a cat", "-n", "2", "--steps", "2", "--seed", "3", "--dtype", "float32"]
    varying = ["--variation-strength", "0.2", "--variation-seed", "8"]
    assert main([*asked, *varying, *out]) == 0
    first, second = (open_picture(tmp_path / f"0000{number}-3.png") for number in range(2))
    assert first.tobytes() != second.tobytes()
    assert main(["generate", "--from", str(tmp_path / "00001-3.png"), *out]) == 0
    assert open_picture(tmp_path / "00002-3.png").tobytes() == second.tobytes()
    assert main([*asked, "--variation-seed", "8", *out]) == 2

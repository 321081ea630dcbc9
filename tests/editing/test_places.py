"""What differs from place to place: prompts of a region, and a strength for each place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_bundle
from torch import Tensor

from latentdiff import Differential, Hires, LatentDiffusionPipeline, SDEdit, UserError, guidance
from latentdiff.cli import main
from latentdiff.diffusion import process as processes
from latentdiff.diffusion import timetable as timetables
from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import Branch, Estimate, bind
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import mixture
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.sampling import sample
from latentdiff.pictures import open_picture
from latentdiff.pipeline.prompts import check_also, read_region
from latentdiff.solvers import create

VP = processes.create("vp-linear")
POSITIVE, NEGATIVE, FURTHER = (Condition(pooled=torch.full((2, 1), float(k))) for k in range(3))
ORACLES = [
    mixture([1.0, 2.0], [[1.0, 0.0], [-1.0, 2.0]], [0.3, 0.5]),
    mixture([1.0], [[0.0, 0.0]], [1.0]),
    mixture([1.0, 1.0], [[0.5, -1.0], [3.0, 0.0]], [0.2, 1.0]),
]


def exact(x: Tensor, level: NoiseLevel, branches: Sequence[Branch]) -> tuple[Estimate, ...]:
    def oracle(branch: Branch) -> Estimate:
        assert branch.condition.pooled is not None
        return ORACLES[int(branch.condition.pooled[0])](x, level)

    return tuple(map(oracle, branches))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_weight_of_a_place_is_that_weight_there_and_none_elsewhere(scale: float) -> None:
    """On mixtures of which each place is drawn for itself, through a whole guided run."""
    weight = torch.zeros(1, 1, 12, 16)
    weight[..., 4:] = 0.8  # at twice the resolution of x
    x = NoiseStreams(0, count=2).draw((2, 6, 8)).double()
    levels = timetables.create("trailing", VP, 5)

    def drawn(further: float | Tensor) -> Tensor:
        composed = guidance.composed(exact, [(FURTHER, further)], NEGATIVE)
        denoise = guidance.classifier_free(composed, POSITIVE, NEGATIVE, scale=scale)
        return sample(denoise, create("ddim", VP), levels, x, noise=NoiseStreams(0, count=2))

    found, alone, weighed = drawn(weight), drawn(0.0), drawn(0.8)
    assert (found[..., :2] - alone[..., :2]).abs().max() < 1e-12
    assert (found[..., 2:] - weighed[..., 2:]).abs().max() < 1e-6  # 0.8 in float32
    assert (alone - weighed).abs().max() > 0.1


def test_regions_reach_the_picture_by_name_box_and_mask(tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    run = {"num_inference_steps": 2, "seed": 0, "progress": False, "output_type": "pt"}
    half = Image.new("L", (32, 32))
    half.paste(255, (16, 0, 32, 32))
    half.save(tmp_path / "half.png")
    by_box = pipe("a cat", also=[("a dog", 2.0, "box:8,0,16,16")], **run).images
    for place in (half, tmp_path / "half.png", str(tmp_path / "half.png")):
        assert torch.equal(pipe("a cat", also=[("a dog", 2.0, place)], **run).images, by_box)
    whole = pipe("a cat", also=[("a dog", 2.0)], **run).images
    assert (by_box - pipe("a cat", **run).images).abs().max() > 1e-2
    assert (by_box - whole).abs().max() > 1e-2
    one = pipe("a cat", also=[("a dog", half)], edits=[Hires(2)], **run).images
    assert (one - pipe("a cat", edits=[Hires(2)], **run).images).abs().max() > 1e-2


def test_regions_that_are_none_are_one_line(tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    wrong: tuple[Any, ...] = (
        ("a dog", 1.0, "box:80,0,99,9"),
        ("a dog", Image.new("L", (32, 16))),
        ("a dog", tmp_path / "none.png"),
        ("a dog", 1.0, 2.0),
        ("a dog", "x", Image.new("L", (16, 16))),
    )
    for also in wrong:
        with pytest.raises(UserError):
            pipe("a cat", also=[also], progress=False)
    assert check_also([("a dog", "0.7")])[0].weight == 0.7
    assert read_region("a dog, or 2:0.5@box:0,0,3,3") == ("a dog, or 2", 0.5, "box:0,0,3,3")
    for text in ("a dog", "@mask.png", "a dog@", "a dog:x1.2:3.@m"):
        with pytest.raises(UserError):
            check_also([read_region(text)])


class Silent(NoiseStreams):
    """Noise of zeros, so that what is put back is known."""

    def draw(self, shape: tuple[int, ...]) -> Tensor:  # pyright: ignore
        return torch.zeros(len(self), *shape)

    def only(self, pictures: list[int]) -> "Silent":  # pyright: ignore
        return Silent([0] * len(pictures))


def test_a_place_is_held_until_its_strength_sets_it_free() -> None:
    image = torch.randn(1, 4, 1, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([0.0, 0.3, 0.5, 0.999, 1.0]).view(1, 1, 1, 5)
    edit = Differential(image, mask)
    levels = timetables.create("trailing", VP, 10)
    held: list[list[bool]] = []

    def look(index: int, level: NoiseLevel, x: Tensor) -> None:
        same = (x - level.alpha * image).abs().amax((0, 1, 2)) < 1e-6
        held.append(same.tolist())

    start = torch.zeros(1, 4, 1, 5)
    denoise = bind(lambda x, level, branches: (Estimate(x + 1.0),), Condition())
    sample(
        denoise, create("ddim", VP), levels, start, edits=[edit], noise=Silent([0]), callback=look
    )
    # Behind step k + 1 a place with k + 1 <= 10 - int(10 * strength) is held.
    wanted = [[k + 1 <= 10 - made for made in (0, 3, 5, 9, 0)] for k in range(10)]
    assert [row[:4] for row in held] == [row[:4] for row in wanted]
    assert not any(row[4] for row in held)  # white is free from the first step on


def test_one_strength_everywhere_is_sdedit_and_black_stays(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    pipe = LatentDiffusionPipeline(tiny_bundle())
    run = {"num_inference_steps": 10, "seed": 0, "progress": False, "output_type": "pt"}
    white = Image.new("L", picture.size, 255)
    uniform = pipe("a cat", edits=[Differential(picture, white, 0.6)], **run).images
    plain = pipe("a cat", edits=[SDEdit(picture, 0.6)], **run).images
    assert torch.equal(uniform, plain)

    ramp = np.zeros((20, 24), dtype=np.uint8)
    ramp[:, 8:] = np.linspace(0, 255, 16)
    run["output_type"] = "pil"
    soft = pipe("a cat", edits=[Differential(picture, Image.fromarray(ramp))], **run).images[0]
    kept = ramp < 26  # less than one of ten steps
    assert (np.asarray(soft)[kept] == np.asarray(picture)[kept]).all()
    assert (np.asarray(soft)[~kept] != np.asarray(picture)[~kept]).any(-1).mean() > 0.9
    with pytest.raises(UserError, match="24 x 20"):
        Differential(picture, Image.new("L", (20, 24)))
    with pytest.raises(UserError, match="strength"):
        Differential(picture, white, 0.0)


def test_the_commands_take_regions_and_soft_masks(tmp_path: Path) -> None:
    bundle = tiny_bundle()
    out = ["--model", str(bundle.save(tmp_path / "model")), "-o", str(tmp_path), "--seed", "1"]
    run = [*out, "--steps", "3", "--dtype", "float32"]
    region = ["--region", "a dog:0.7@box:0,0,8,16"]
    assert main(["generate", "a cat", *region, *run]) == 0
    drawn = open_picture(tmp_path / "00000-1.png")
    assert main(["generate", "--from", str(tmp_path / "00000-1.png"), *out[:4]]) == 0
    assert open_picture(tmp_path / "00001-1.png").tobytes() == drawn.tobytes()
    assert main(["generate", "a cat", "--region", "a dog@none.png", *run]) == 2
    Image.linear_gradient("L").resize((16, 16)).save(tmp_path / "soft.png")
    soft = ["--soft-mask", str(tmp_path / "soft.png")]
    assert main(["edit", str(tmp_path / "00000-1.png"), "a dog", *soft, *run]) == 0
    changed = (np.asarray(open_picture(tmp_path / "00002-1.png")) != np.asarray(drawn)).any(-1)
    assert not changed[:2].any()
    assert changed[-4:].mean() > 0.5
    assert (
        main(["edit", str(tmp_path / "00000-1.png"), "a dog", *soft, "--repeats", "2", *run]) == 2
    )

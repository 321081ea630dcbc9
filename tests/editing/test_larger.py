"""Pictures larger than a model's own: the high-resolution pass, and windows that are averaged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_bundle, tiny_control
from torch import Tensor
from torch.nn.functional import interpolate

from latentdiff import (
    ILVR,
    PAG,
    Control,
    Hires,
    LatentDiffusionPipeline,
    Request,
    SDEdit,
    TiledDiffusion,
    UserError,
)
from latentdiff.cli import main
from latentdiff.diffusion import process as processes
from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import Branch, Estimate
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import mixture
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.sampling import sample
from latentdiff.models.control import ControlNetwork
from latentdiff.models.controlnet import ControlNet
from latentdiff.pictures import open_picture

ORACLES = [
    mixture([1.0, 2.0], [[1.0, 0.0], [-1.0, 2.0]], [0.3, 0.5]),
    mixture([1.0, 1.0], [[0.5, -1.0], [3.0, 0.0]], [0.2, 1.0]),
]
BRANCHES = [Branch("positive", Condition()), Branch("negative", Condition())]


def exact(x: Tensor, level: NoiseLevel, branches: Sequence[Branch]) -> tuple[Estimate, ...]:
    """Data of which each place is drawn for itself: no window sees less than the whole."""
    assert x.shape[-2:] == (6, 5)
    return tuple(oracle(x, level) for oracle, _ in zip(ORACLES, branches, strict=True))


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.7])
def test_windows_are_exact_where_the_data_factorise(overlap: float) -> None:
    x = torch.randn(2, 2, 17, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level = processes.create("vp-linear").level(0.5)
    tiled = TiledDiffusion(overlap, (6, 5)).conditioned(exact)
    for oracle, estimate in zip(ORACLES, tiled(x, level, BRANCHES), strict=True):
        assert (estimate.x0 - oracle(x, level).x0).abs().max() < 1e-12
        assert estimate.variance is None


def test_windows_are_averaged_by_their_weights() -> None:
    """Against the formula written out, with a denoiser that sees all of its window at once."""
    x = torch.randn(1, 1, 1, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def means(x: Tensor, level: NoiseLevel, branches: Sequence[Branch]) -> tuple[Estimate, ...]:
        return (Estimate(x.mean((2, 3), keepdim=True).expand_as(x), 2 * x),)

    tiled = TiledDiffusion(0.5, (1, 4)).conditioned(means)
    (found,) = tiled(x, processes.create("vp-linear").level(0.5), BRANCHES[:1])
    row, weight = x[0, 0, 0], torch.tensor([1.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    above, below = torch.zeros_like(row), torch.zeros_like(row)
    for start in (0, 2, 3):  # three windows of 4 in 7, half of each covered by the next
        above[start : start + 4] += weight * row[start : start + 4].mean()
        below[start : start + 4] += weight
    assert (found.x0[0, 0, 0] - above / below).abs().max() < 1e-12
    assert found.variance is not None
    assert (found.variance - 2 * x).abs().max() < 1e-12


def test_windows_go_with_guidance_and_see_no_more_than_the_model_knows() -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    run = {"num_inference_steps": 2, "seed": 0, "progress": False, "output_type": "latent"}
    sizes: set[tuple[int, ...]] = set()

    def seen(module: object, given: tuple[Tensor, ...]) -> None:
        sizes.add(tuple(given[0].shape[-2:]))

    handle = pipe.bundle.network.module.register_forward_pre_hook(seen)
    edits = [TiledDiffusion(0.25), PAG(2.0)]
    for guidance in ("cfg", "apg"):
        tiled = pipe("a cat", height=32, width=24, guidance=guidance, edits=edits, **run)
        assert tiled.images.isfinite().all()
        assert tiled.nfe == 2 * 3 * 2
    handle.remove()
    assert sizes == {(8, 8)}
    small = pipe("a cat", edits=[TiledDiffusion()], **run).images
    assert torch.equal(small, pipe("a cat", **run).images)


@pytest.mark.parametrize("steps", [None, 6])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "unipc"])
def test_the_second_pass_is_sdedit_of_the_enlarged_first(solver: str, steps: int | None) -> None:
    """Against the two passes made by hand, to the bit. Of its own steps, as A1111's
    `setup_img2img_steps` counts: int(6 / 0.7) = 8, the last 6 of which are made."""
    pipe = LatentDiffusionPipeline(tiny_bundle())
    asked: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 5, "solver": solver}
    asked |= {"seed": 3, "first": 2}
    edits = [Hires(1.5, 0.7, steps)]
    output = pipe.draw(Request(**asked, edits=edits), output_type="pt", progress=False)
    assert output.images.shape == (1, 3, 24, 24)
    assert output.nfe == 5 + (steps or 3)
    more: dict[str, Any] = asked | {"num_inference_steps": 8}
    finer = pipe.prepare(Request(**more)).levels

    run = pipe.prepare(Request(**asked))
    autoencoder = pipe.bundle.autoencoder
    with torch.no_grad():
        small = autoencoder.decode(run.finish("latent").images)
        large = interpolate(small, size=(24, 24), mode="bicubic").clamp(-1, 1)
        clean = autoencoder.encode(large)
        streams = NoiseStreams(3, 2, 1)
        streams.draw((4, 8, 8))
        levels = run.levels[-4:] if steps is None else finer[-7:]
        start = levels[0]
        x = start.alpha * clean + start.sigma * streams.draw((4, 12, 12))
        x = sample(run.denoise, run.solver, levels, x, noise=streams)
    assert (output.latents - x).abs().max() < 1e-5


@pytest.mark.parametrize("solver", ["ddpm", "heun"])
def test_the_second_pass_goes_with_guidance_and_draws_each_picture_by_itself(solver: str) -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    edits = ["tiled:0.5", "hires:2:0.5", "threshold:0.9"]
    run = {"num_inference_steps": 4, "solver": solver, "guidance": "apg", "progress": False}
    both = pipe(["a cat"] * 2, seed=1, edits=edits, output_type="pt", **run).images
    second = pipe("a cat", seed=1, first=1, edits=edits, output_type="pt", **run).images
    assert both.shape == (2, 3, 32, 32)
    assert (both[1] - second[0]).abs().max() < 1e-4
    assert (both[0] - both[1]).abs().max() > 1e-2


def test_what_does_not_go_with_a_second_pass_is_one_line() -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    picture = Image.new("RGB", (15, 16), "red")
    early = pipe("a cat", edits=[SDEdit(picture, 0.5), Hires(2)], seed=0, progress=False)
    assert early.images[0].size == (30, 32)  # padded to 16 x 16 in between
    for edits in (["hires:2:0.5", ILVR(picture)], ["hires:2:0.5", "hires:2:0.5"]):
        with pytest.raises(UserError, match="edits: "):
            pipe("a cat", edits=edits, progress=False)
    levels = pipe.bundle.timetable(None, 5)
    with pytest.raises(UserError, match="level by level"):
        pipe("a cat", edits=["hires:2:0.5:3"], timetable=levels, progress=False)
    for text in (
        "hires:2:0.5:0",
        "hires:2:0.5:501",
        "hires:2:0.5:x",
        f"hires:2:0.5:{'9' * 5000}",
        "hires:2:0.5:3:1",
    ):
        with pytest.raises(UserError):
            pipe("a cat", edits=[text], progress=False)
    for text in ("hires:2", "hires:0.5:0.5", "hires:2:x", "hires:2:0", "tiled:1", "tiled"):
        with pytest.raises(UserError):
            pipe("a cat", edits=[text], progress=False)
    with pytest.raises(UserError, match="less than one step"):
        pipe("a cat", edits=["hires:2:0.1"], num_inference_steps=5, progress=False)
    with pytest.raises(UserError, match="height: must be"):
        pipe("a cat", height=1024, width=1024, edits=["hires:8:0.5"], progress=False)


def test_the_command_draws_larger_and_again(tmp_path: Path) -> None:
    model = str(tiny_bundle().save(tmp_path / "model"))
    out = ["-o", str(tmp_path), "--model", model, "--dtype", "float32"]
    asked = ["generate", "a cat", "--steps", "4", "--seed", "5", "--hires", "2"]
    assert main([*asked, "--guide", "tiled:0.5", *out]) == 0
    drawn = open_picture(tmp_path / "00000-5.png")
    assert drawn.size == (32, 32)
    assert main(["generate", "--from", str(tmp_path / "00000-5.png"), *out]) == 0
    assert open_picture(tmp_path / "00001-5.png").tobytes() == drawn.tobytes()
    assert main([*asked[:-1], "0.5", *out]) == 2


def test_windows_are_told_their_part_of_a_control() -> None:
    """What differs in the second of two windows alone changes nothing in the first."""
    pipe = LatentDiffusionPipeline(tiny_bundle())
    theirs: Any = tiny_control()
    module = ControlNet(dict(theirs.config))
    module.load_state_dict(theirs.state_dict())
    network = ControlNetwork(module.eval().requires_grad_(False))
    run: dict[str, Any] = {
        "num_inference_steps": 2,
        "seed": 0,
        "progress": False,
        "output_type": "latent",
    }
    half = Image.new("RGB", (32, 16), "white")
    half.paste("black", (24, 0, 32, 16))
    edits = [TiledDiffusion(0.0)]

    def drawn(picture: Image.Image) -> Tensor:
        control = Control(network, picture)
        return pipe("a cat", controls=[control], edits=edits, **run).images

    found, white = drawn(half), drawn(Image.new("RGB", (32, 16), "white"))
    assert (found[..., :8] - white[..., :8]).abs().max() < 1e-4
    assert (found[..., 8:] - white[..., 8:]).abs().max() > 1e-2
    with pytest.raises(UserError, match="controls"):
        pipe("a cat", controls=[Control(network, half)], edits=[Hires(2)], **run)

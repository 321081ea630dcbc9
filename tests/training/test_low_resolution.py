"""Stage 2 of a network that enlarges, in pixels and in latents, on twelve pictures of discs."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scripts import picture_folder, script
from tiny import tiny_upscaler, tiny_vae
from torch import Tensor

from latentdiff import Enlarge, LatentDiffusionPipeline, SDEdit
from latentdiff.bundle import Bundle
from latentdiff.data.folder import read_folder
from latentdiff.diffusion import process as processes
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.editing import RunContext
from latentdiff.editing.lowpass import enlarged
from latentdiff.errors import UserError
from latentdiff.formats.autoencoder_files import load_autoencoder
from latentdiff.formats.diffusers_save import save_network
from latentdiff.learning.checkpoint import checkpoints
from latentdiff.learning.config import validate
from latentdiff.learning.denoising import Conditioned
from latentdiff.learning.low_resolution import Pairs
from latentdiff.models.haar import HaarTransform, PixelAutoencoder, fitted_transform
from latentdiff.models.network import LowResolution
from latentdiff.pictures import to_tensor

BASE = {
    "unet": {"channels": [64, 64], "attention": [False, False], "head_dim": 16},
    "text": {"vocabulary": 540, "window": 8, "width": 32, "layers": 1, "heads": 2},
    "objective": {"caption_dropout": 1.0},
    "optim": {"lr": 2e-3, "steps": 4, "warmup": 0, "batch_size": 4, "ema_decay": 0.5},
    "evaluate_every": 100,
    "checkpoint_every": 2,
    "log_every": 1,
    "save_dtype": "float32",
}
SMALL = {"size": 32, "low_resolution": 16, "max_noise_level": 20, "held_out_fraction": 0.0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("low") / "pictures")


def train(pictures: Path, out: Path, **settings: object) -> Path:
    """One run in this process; the folder of its model."""
    module = script("diffusion")
    given = {**BASE, "haar": 1, "data": SMALL, **settings}
    given["data"] = {"root": str(pictures), **given["data"]}
    module.train(validate(module.DiffusionConfig, {**given, "out": str(out)}, "test"), False)
    return out / "model"


def test_a_run_that_goes_on_ends_in_the_same_weights(pictures: Path, tmp_path: Path) -> None:
    """From the save in the middle: levels and noise of what is shown come again, too."""
    model = train(pictures, tmp_path / "out")
    whole = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    shutil.rmtree(checkpoints(tmp_path / "out" / "checkpoints")[0])
    shutil.rmtree(model)
    again = load_file(
        train(pictures, tmp_path / "out") / "unet" / "diffusion_pytorch_model.safetensors"
    )
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    bundle = Bundle.load(model)
    low = bundle.network.low_resolution
    assert low is not None
    assert (bundle.kind, low.ratio, low.max_noise_level) == ("upscaling", 2, 20)
    card = (model / "README.md").read_text()
    assert "latentdiff enlarge picture.png 2 --model" in card
    assert "pipeline_tag: image-to-image" in card
    small = Image.open(pictures / "0.png").convert("RGB").resize((16, 16))
    drawn = LatentDiffusionPipeline(bundle)(
        "", edits=[Enlarge(small)], num_inference_steps=2, guidance_scale=1.0, progress=False
    ).images[0]
    assert drawn.size == (32, 32)


def test_the_network_is_shown_the_small_picture_of_what_it_draws(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its level; x_t, in little noise, is that very picture's."""
    told: list[dict[str, Tensor]] = []
    own = Conditioned.forward

    def heard(self: Any, x: Tensor, t: Tensor, words: Any, **given: Any) -> Tensor:
        told.append({"x": x, "t": t, **given})
        return own(self, x, t, words, **given)

    monkeypatch.setattr(Conditioned, "forward", heard)
    data = {**SMALL, "max_noise_level": 0}
    train(pictures, tmp_path / "out", data=data, optim={**BASE["optim"], "batch_size": 12})
    seen = {name: torch.cat([one[name] for one in told[:4]]) for name in told[0]}
    assert not seen["noise_level"].any()
    clean = seen["t"] < 100
    assert 2 <= clean.sum() < len(clean)
    autoencoder = load_autoencoder(tmp_path / "out/model/vae")
    large = autoencoder.decode(seen["x"][clean])
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    near = (shrunk - seen["beside"][clean]).abs().mean((1, 2, 3))
    far = (shrunk - seen["beside"][clean].roll(1, 0)).abs().mean((1, 2, 3))
    assert near.max() < 0.15
    assert far.max() > 0.3  # some rows may hold the same picture


def test_a_model_of_what_lanczos_lacks_begins_as_lanczos(pictures: Path, tmp_path: Path) -> None:
    """Of a network that says no: its pictures are Lanczos's, and its latents have unit variance."""
    data = {**SMALL, "residual": True}
    model = train(pictures, tmp_path / "out", data=data)
    bundle = Bundle.load(model)
    low = bundle.network.low_resolution
    assert low is not None
    assert low.residual
    pairs = Pairs(read_folder(pictures), 32, 16)
    every = pairs.residuals(range(12))
    latents = bundle.autoencoder.encode(every)
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.05
    grey = np.random.default_rng(0).integers(90, 160, (16, 16, 3), dtype=np.uint8)
    small = Image.fromarray(grey)  # of so little contrast that Pillow clamps nothing
    wanted = to_tensor(small.resize((32, 32), Image.Resampling.LANCZOS))[None]
    nothing = torch.zeros(1, 3, 32, 32)
    noise, process = NoiseStreams(0), bundle.process
    context = RunContext(32, 32, bundle.autoencoder, [""], process, (16, 16), None, low, noise)
    ending = Enlarge(small, hold=False).bind(context)[1]
    assert (ending(nothing) - wanted).abs().max() < 2 / 127.5  # Pillow rounds twice
    assert ending(nothing + 0.5).sub(ending(nothing)).sub(0.5).abs().max() < 1e-6
    pipe = LatentDiffusionPipeline(bundle)
    with pytest.raises(UserError, match="SDEdit does not go with it"):
        pipe("", edits=[SDEdit(small.resize((32, 32)), 0.5), Enlarge(small)], progress=False)
    lanczos = enlarged(pairs.small[4:5].float() / 127.5 - 1, (32, 32))
    assert (every[4:5] + lanczos - pairs.pictures([4])).abs().max() < 1e-5
    index = json.loads((model / "model_index.json").read_text())
    assert index["latentdiff_residual"] is True
    (model / "model_index.json").write_text(json.dumps({**index, "latentdiff_residual": 1}))
    with pytest.raises(UserError, match="latentdiff_residual"):
        Bundle.load(model)


def test_an_autoencoder_of_stage_1_does_as_well(pictures: Path, tmp_path: Path) -> None:
    save_network(tiny_vae(), tmp_path / "vae")
    model = train(pictures, tmp_path / "out", haar=None, vae=str(tmp_path / "vae"))
    assert json.loads((model / "model_index.json").read_text())["max_noise_level"] == 20
    assert Bundle.load(model).network.in_channels == 7


def test_pairs_are_a_function_of_seed_step_and_place(pictures: Path) -> None:
    pairs = Pairs(read_folder(pictures), 32, 16)
    low = LowResolution(processes.create("vp-linear"), 350, 2)
    shown, levels = pairs.shown(low, 3, 5, [0, 1, 2], [4, 4, 7], (16, 16))
    one, level = pairs.shown(low, 3, 5, [1], [4], (16, 16))
    assert torch.equal(shown[1:2], one)
    assert levels[1] == level[0]
    assert len(set(levels.tolist())) == 3
    assert (shown[0] - shown[1]).abs().max() > 0.01
    for row, level, sample in zip(shown, levels, [4, 4, 7], strict=True):
        here = low.process.level(int(level))
        noise = (row - here.alpha * (pairs.small[sample].float() / 127.5 - 1)) / here.sigma
        assert abs(noise.std() - 1) < 0.1
    small = pairs.shown(low, 3, 5, [0], [4], (32, 32))[0]  # SR3's form
    assert small.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_the_transform_is_orthonormal_and_standardises(levels: int) -> None:
    random = torch.Generator().manual_seed(0)
    pictures = torch.rand(5, 3, 16, 24, generator=random) * torch.tensor([1, 0.5, 2]).view(3, 1, 1)
    module = HaarTransform({"levels": levels})
    bands = module(pictures)
    assert bands.shape == (5, 3 * 4**levels, 16 // 2**levels, 24 // 2**levels)
    assert (module.inverse(bands) - pictures).abs().max() < 1e-6
    assert (bands.square().sum() / pictures.square().sum() - 1).abs() < 1e-5
    means = torch.nn.functional.avg_pool2d(pictures, 2**levels) * 2**levels
    assert (bands[:, :3] - means).abs().max() < 1e-5
    autoencoder = fitted_transform(levels, [pictures[:2], pictures[2:]])
    latents = autoencoder.encode(pictures)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert (latents.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4
    assert (autoencoder.decode(latents) - pictures).abs().max() < 1e-5
    drawn = autoencoder.draw(autoencoder.moments(pictures), torch.randn(latents.shape))
    assert torch.equal(drawn, latents)


def test_a_difference_along_each_axis_has_a_band_of_its_own() -> None:
    """A column, a row and a checkerboard of one block."""
    module = HaarTransform({"levels": 1})
    block = torch.zeros(3, 1, 2, 2)
    block[0, 0] = torch.tensor([[1.0, -1], [1, -1]])
    block[1, 0] = torch.tensor([[1.0, 1], [-1, -1]])
    block[2, 0] = torch.tensor([[1.0, -1], [-1, 1]])
    bands = module(block.expand(-1, 3, -1, -1))[:, ::3, 0, 0]
    assert torch.equal(bands, torch.tensor([[0.0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 2]]))


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_a_deviation_that_is_none_is_refused(value: float, tmp_path: Path) -> None:
    module = HaarTransform({"levels": 1})
    save_network(module, tmp_path / "sound")
    load_autoencoder(tmp_path / "sound")
    with torch.no_grad():
        module.std[3] = value
    save_network(module, tmp_path / "vae")
    with pytest.raises(UserError, match="its std must be above 0"):
        load_autoencoder(tmp_path / "vae")


def test_a_model_of_pixels_is_saved_and_opened(pictures: Path, tmp_path: Path) -> None:
    data = {"size": 32, "held_out_fraction": 0.0}
    model = train(pictures, tmp_path / "out", data=data)
    bundle = Bundle.load(model)
    assert isinstance(bundle.autoencoder, PixelAutoencoder)
    assert (bundle.kind, bundle.size, bundle.network.channels) == ("text-to-image", (32, 32), 12)
    drawn = LatentDiffusionPipeline(bundle)("a red disc", num_inference_steps=2, progress=False)
    assert drawn.images[0].size == (32, 32)
    config = json.loads((model / "vae" / "config.json").read_text())
    for levels in (9, -1, "1", None, True):
        (model / "vae" / "config.json").write_text(json.dumps({**config, "levels": levels}))
        with pytest.raises(UserError, match="levels must be 0"):
            Bundle.load(model)
    with pytest.raises(UserError, match="saved as a folder"):
        bundle.save(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"vae": "vae"}, "one of them"),
        ({"haar": None}, "one of them"),
        ({"haar": 7}, "less than or equal to 4"),
        ({"data": {**SMALL, "low_resolution": 12}}, "must divide data.size"),
        ({"data": {**SMALL, "low_resolution": 32}}, "must divide data.size"),
        ({"data": {"size": 32, "max_noise_level": 3}}, "is of data.low_resolution"),
        ({"data": {"size": 32, "residual": True}}, "data.residual is of data.low_resolution"),
        ({"shards_at_hand": 3}, "not with shards_at_hand"),
        ({"haar": 2}, "multiple of the autoencoder's factor, 4"),
    ],
)
def test_what_does_not_fit_is_one_line(
    settings: dict[str, object], told: str, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        train(pictures, tmp_path / "out", **settings)


def test_a_seam_is_the_step_across_a_border_beside_those_near_it() -> None:
    module: Any = script("measure/evaluate_enlarge")
    ramp = torch.arange(32.0).expand(2, 3, 32, 32) / 16
    assert abs(module.seam(ramp, [], [8, 16], 2) - 1) < 1e-5
    torn = ramp.clone()
    torn[..., 16:] += 1 / 16  # a step twice as high as the others
    assert abs(module.seam(torn, [], [16], 2) - 2) < 1e-5
    assert abs(module.seam(torn.transpose(-1, -2), [16], [], 2) - 2) < 1e-5
    assert abs(module.seam(torn, [], [8, 16], 2) - 1.5) < 1e-5


def test_the_measure_beside_lanczos(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model that has learned nothing: what is held agrees all the same."""
    module: Any = script("measure/evaluate_enlarge")
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    apart = tmp_path / "pictures"
    shutil.copytree(pictures, apart)
    rows = [json.loads(line) for line in lines]
    for number, row in enumerate(rows):
        row["split"] = "train" if number < 8 else "test_new"
    (apart / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_upscaler("waves").save(tmp_path / "model")
    settings = {"steps": 2, "solver": None, "noise_level": 0, "features": "random", "seed": 0}
    module.main(model, apart, 9, hold=True, seams=2, out=tmp_path / "out", **settings)
    told = json.loads((tmp_path / "out/enlarge.json").read_text())
    assert told["pictures"] == 4
    assert told["Lanczos"]["distance"] < told["model"]["distance"]
    assert told["model"]["psnr shrunk"] > 20
    assert set(told["seams"]) == {"in windows", "as a whole"}
    assert "below Lanczos" in capsys.readouterr().out

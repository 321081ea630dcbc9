"""An energy by recovery likelihood on twelve pictures: it goes on, draws and composes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scripts import picture_folder, script
from tiny import tiny_bundle, with_own_networks

from latentdiff import ILVR, RePaint
from latentdiff.bundle import Bundle
from latentdiff.editing import box_mask
from latentdiff.errors import UserError
from latentdiff.learning.checkpoint import checkpoints
from latentdiff.learning.config import validate
from latentdiff.learning.denoising import Conditioned
from latentdiff.models.cross_attention_unet import EnergyUNet
from latentdiff.models.engines.packed import cannot_pack
from latentdiff.pictures import open_picture
from latentdiff.pipeline import LatentDiffusionPipeline

BASE = {
    "optim": {"steps": 4, "batch_size": 4, "lr": 1e-3, "warmup": 0, "ema_decay": 0.5},
    "unet": {"channels": [64], "attention": [True], "head_dim": 32},
    "levels": 3,
    "langevin": 3,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_prompts": ["a red disc"],
}


def learn(work: Path, out: Path, **settings: object) -> Path:
    """One run in this process."""
    module = script("energy")
    data = {"root": str(work / "pictures"), "size": 16, "held_out_fraction": 0.0}
    values = {**BASE, "out": str(out), "model": str(work / "model"), "data": data, **settings}
    module.train(validate(module.EnergyConfig, values, "test"), False)
    return out


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pictures`; `model`, a tiny bundle as a folder; `out`, the run of an energy."""
    folder = tmp_path_factory.mktemp("energy")
    picture_folder(folder / "pictures")
    with_own_networks(tiny_bundle()).save(folder / "model")
    learn(folder, folder / "out")
    return folder


def test_a_run_that_goes_on_ends_in_the_same_energy(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "out", tmp_path / "out")
    whole = load_file(work / "out/model/unet/diffusion_pytorch_model.safetensors")
    shutil.rmtree(checkpoints(tmp_path / "out/checkpoints")[0])
    shutil.rmtree(tmp_path / "out/model")
    learn(work, tmp_path / "out")
    again = load_file(tmp_path / "out/model/unet/diffusion_pytorch_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    assert (tmp_path / "out/log.jsonl").read_bytes() == (work / "out/log.jsonl").read_bytes()


@pytest.fixture(scope="module")
def energy(work: Path) -> Bundle:
    return Bundle.load(work / "out/model")


def test_what_it_gives_is_the_gradient_of_its_density(energy: Bundle) -> None:
    """By differences of f, in float64; and again differentiable for guides that go through it."""
    unet = energy.network.module.double()
    assert isinstance(unet, EnergyUNet)
    random = torch.Generator().manual_seed(0)
    x, way = torch.randn(2, 2, 4, 8, 8, generator=random, dtype=torch.float64)
    states = energy.conditioner.encode(["a red disc"] * 2, (16, 16)).condition.states
    assert states is not None
    told = torch.tensor([300.0, 600.0]), states.double()
    with torch.no_grad():
        score = unet(x, *told)
        ends = [unet.log_density(x + h * way, *told) for h in (1e-5, -1e-5)]
    slope = (ends[0] - ends[1]) / 2e-5
    along = (score * way).flatten(1).sum(1)
    assert (slope - along).abs().max() < 1e-6 * along.abs().max()
    assert not score.requires_grad
    assert unet(x.clone().requires_grad_(), *told).requires_grad
    unet.float()


def test_the_pipeline_draws_with_it_and_edits_compose(work: Path, energy: Bundle) -> None:
    assert (energy.prediction, energy.solver) == ("score", "recovery-langevin")
    assert "energy" in str(cannot_pack(energy.network.module))
    pipe = LatentDiffusionPipeline(energy)
    picture = open_picture(work / "pictures/0.png").resize((16, 16))

    def drawn(**more: object) -> np.ndarray:
        settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 0, "progress": False}
        images = pipe("a red disc", **{**settings, **more}).images  # pyright: ignore[reportArgumentType]
        return np.asarray(images[0]).astype(int)

    plain = drawn(solver="ddpm")
    assert abs(plain - drawn()).max() > 0
    mask = box_mask("8,0,16,16", picture.size)
    painted = drawn(edits=[RePaint(picture, mask, resamples=1)], solver="ddpm")
    known = np.asarray(picture.convert("RGB")).astype(int)
    assert abs(painted[:, :8] - known[:, :8]).max() == 0
    assert abs(drawn(edits=[ILVR(picture)], solver="ddpm") - plain).max() > 3


def test_it_is_read_again_and_trained_by_nothing_else(energy: Bundle, tmp_path: Path) -> None:
    again = Bundle.load(energy.save(tmp_path / "again"))
    x, t = torch.ones(1, 4, 8, 8), torch.tensor([400.0])
    told = energy.conditioner.encode(["a red disc"], (16, 16)).condition
    assert (again.network(x, t, told) - energy.network(x, t, told)).abs().max() < 1e-5
    assert (again.network(2 * x, t, told) - energy.network(x, t, told)).abs().max() > 0.1
    with pytest.raises(UserError, match=r"is an energy, which training/energy\.py alone trains"):
        Conditioned(again)

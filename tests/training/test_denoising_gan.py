"""A denoising GAN on twelve pictures and a tiny model: it goes on, draws and composes."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scripts import picture_folder, script
from tiny import tiny_bundle, with_own_networks

from latentdiff import ILVR, RePaint, SDEdit
from latentdiff.bundle import Bundle
from latentdiff.diffusion import timetable
from latentdiff.editing import box_mask
from latentdiff.errors import UserError
from latentdiff.learning.checkpoint import checkpoints
from latentdiff.learning.config import validate
from latentdiff.learning.distillation import with_noise_input
from latentdiff.learning.run import Run
from latentdiff.pictures import open_picture
from latentdiff.pipeline import LatentDiffusionPipeline

BASE = {
    "optim": {"steps": 4, "batch_size": 4, "lr": 1e-3, "warmup": 0, "ema_decay": 0.5},
    "steps": 3,
    "noise": 8,
    "width": 16,
    "penalty_every": 2,
    "log_every": 1,
    "checkpoint_every": 2,
    "save_dtype": "float32",
    "sample_prompts": ["a red disc"],
}


def learn(work: Path, out: Path, **settings: object) -> Path:
    """One run in this process."""
    module = script("denoising_gan")
    module.train(config_of(module, work, out, **settings), False)
    return out


def config_of(module: Any, work: Path, out: Path, **settings: object) -> Any:
    data = {"root": str(work / "pictures"), "size": 16, "held_out_fraction": 0.0}
    values = {**BASE, "out": str(out), "model": str(work / "model"), "data": data, **settings}
    return validate(module.GanConfig, values, "test")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pictures`; `model`, a tiny bundle as a folder; `out`, the run of a GAN out of it."""
    folder = tmp_path_factory.mktemp("gan")
    picture_folder(folder / "pictures")
    with_own_networks(tiny_bundle()).save(folder / "model")
    learn(folder, folder / "out")
    return folder


@pytest.fixture(scope="module")
def heard(work: Path) -> Bundle:
    """The model, with a generator that hears its noise well."""
    bundle = Bundle.load(work / "out/model")
    weight = bundle.network.module.get_parameter("time_embedding.cond_proj.weight")
    torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    return bundle


def test_a_run_that_goes_on_ends_in_the_same_generator(work: Path, tmp_path: Path) -> None:
    """From the save in the middle, with the discriminator and its optimizer."""
    shutil.copytree(work / "out", tmp_path / "out")
    whole = load_file(work / "out/model/unet/diffusion_pytorch_model.safetensors")
    newest = checkpoints(tmp_path / "out/checkpoints")[0]
    assert (newest / "discriminator.safetensors").is_file()
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "out/model")
    learn(work, tmp_path / "out")
    again = load_file(tmp_path / "out/model/unet/diffusion_pytorch_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    log = (work / "out/log.jsonl").read_bytes()
    assert (tmp_path / "out/log.jsonl").read_bytes() == log
    assert log.count(b"penalty") == 2


def test_at_first_it_is_the_model_and_then_both_networks_move(work: Path) -> None:
    model = Bundle.load(work / "model")
    begun = with_noise_input(model, 8).network.module.state_dict()
    assert not begun.pop("time_embedding.cond_proj.weight").any()
    plain = model.network.module.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in begun.items())
    after = load_file(work / "out/model/unet/diffusion_pytorch_model.safetensors")
    assert after["time_embedding.cond_proj.weight"].abs().max() > 1e-4
    assert (after["conv_out.weight"] - plain["conv_out.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_as_many_captions_are_left_out_as_the_config_says(
    work: Path, tmp_path: Path, dropout: float
) -> None:
    gan = script("denoising_gan")
    config = config_of(gan, work, tmp_path / "out", caption_dropout=dropout)
    with Run(config, True) as run:
        conditioner = Bundle.load(work / "model").conditioner
        nothing = conditioner.states(conditioner.tokenize([""])).states
        _, _, words = gan.Adversarial(config, run).pictures.draw(0, [0, 1], [0, 1], 1)
    for row in words.states:
        assert torch.equal(row, nothing[0]) is (dropout == 1)


def drawn(bundle: Bundle, **more: object) -> np.ndarray:
    """Pictures [B, H, W, 3] of three steps."""
    settings = {"prompt": "a red disc", "num_inference_steps": 3, "progress": False, **more}
    images = LatentDiffusionPipeline(bundle)(**settings).images  # pyright: ignore[reportArgumentType]
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_it_draws_with_noise_of_its_own_in_one_call_a_step(work: Path, heard: Bundle) -> None:
    """A picture is the same in any batch; another code beside the same x_t is another picture."""
    assert (heard.solver, heard.network.noise_width) == ("ddpm", 8)
    assert heard.network.guidance_width is None
    assert tuple(heard.plan(3)[1]) == tuple(timetable.create("trailing", heard.process, 3))
    told: list[torch.Tensor] = []
    calls = heard.network.module.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["timestep_cond"]), with_kwargs=True
    )
    two = drawn(heard, num_images_per_prompt=2, seed=0)
    calls.remove()
    assert [tuple(code.shape) for code in told] == [(2, 8)] * 3
    assert len({tuple(row) for code in told for row in code.tolist()}) == 6
    alone = drawn(heard, seed=0, first=1)
    assert abs(two[1] - alone[0]).max() <= 1
    guided = drawn(heard, seed=0, guidance_scale=3.0)  # under both conditions the same code
    assert abs(guided[0] - two[0]).max() > 1
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    codes = [drawn(heard, latents=latents, seed=seed, solver="ddim") for seed in (1, 2)]
    assert abs(codes[0] - codes[1]).max() > 3
    mute = Bundle.load(work / "model")
    assert (
        abs(
            drawn(mute, latents=latents, seed=1, solver="ddim")
            - drawn(mute, latents=latents, seed=2, solver="ddim")
        ).max()
        == 0
    )


def test_edits_compose_and_what_must_stay_stays(work: Path, heard: Bundle) -> None:
    """SDEdit, RePaint and ILVR in three steps; known pixels are those of the picture."""
    picture = open_picture(work / "pictures/0.png").resize((16, 16))
    mask = box_mask("8,0,16,16", picture.size)
    painted = drawn(heard, edits=[RePaint(picture, mask, resamples=2)], seed=0)[0]
    known = np.asarray(picture.convert("RGB")).astype(int)
    assert abs(painted[:, :8] - known[:, :8]).max() == 0
    assert abs(painted[:, 8:] - known[:, 8:]).max() > 0
    both = drawn(heard, edits=[SDEdit(picture, 0.7), RePaint(picture, mask)], seed=0)[0]
    assert abs(both[:, :8] - known[:, :8]).max() == 0
    kept = drawn(heard, edits=[ILVR(picture)], seed=0)
    assert kept.shape == (1, 16, 16, 3)
    assert abs(kept - drawn(heard, seed=0)).max() > 3


@pytest.mark.parametrize("where", ["folder", "one.safetensors"])
def test_it_comes_back_and_diffusers_is_not_told_that_it_can_draw(
    heard: Bundle, tmp_path: Path, where: str
) -> None:
    path = heard.save(tmp_path / where)
    again = Bundle.load(path)
    assert again.network.noise_width == 8
    assert (drawn(again, seed=4) == drawn(heard, seed=4)).all()
    if path.is_dir():
        assert '"_class_name": "LatentDiffusionPipeline"' in (path / "model_index.json").read_text()


def test_other_levels_than_it_learned_are_told_in_a_line(heard: Bundle) -> None:
    assert heard.steps.trained_steps == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(heard, seed=0)
    for other in ({"num_inference_steps": 4}, {"timetable": "linspace"}):
        with pytest.warns(UserWarning, match=r"levels of 3 steps.*--steps 3"):
            drawn(heard, seed=0, **other)


def test_without_its_noise_it_is_refused(heard: Bundle, work: Path, tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline(heard)
    with pytest.raises(UserError, match=r"a generator is told noise"):
        pipe.invert(open_picture(work / "pictures/0.png").resize((16, 16)), "a red disc")
    tiny_bundle(in_channels=9).save(tmp_path / "model")
    with pytest.raises(UserError, match="no generator can begin"):
        learn(work, tmp_path / "out", model=str(tmp_path / "model"))
    tiny_bundle(learned_variance=True).save(tmp_path / "told")
    with pytest.raises(UserError, match="tells a variance"):
        learn(work, tmp_path / "out", model=str(tmp_path / "told"))
    distill = script("distill")
    config = distill.DistillConfig(out=tmp_path / "d", data={"root": work, "size": 16})
    with pytest.raises(UserError, match="not distilled here"):
        distill.check_teacher(heard, config)

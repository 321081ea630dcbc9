"""Latents equal to those of diffusers' upscaling pipeline on shared tiny weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale import (
    StableDiffusionUpscalePipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from tiny import WIDTH, draw_weights, tiny_unet, tiny_upscaler, tower_of, vae_of
from torch import Tensor

from latentdiff import Enlarge, LatentDiffusionPipeline
from latentdiff.bundle import Bundle
from latentdiff.diffusion import process as processes
from latentdiff.errors import UserError
from latentdiff.models.haar import HaarTransform, PixelAutoencoder
from latentdiff.models.network import LowResolution, UpscalingUNet

TOLERANCE = 1e-4  # of latents of about unit variance
PROMPTS = ["a red heart", "a red cat"]
NEGATIVES = ["a blue square", "a sad dog"]
SEEDS = [3, 5]


def upscaler_unet() -> UNet2DConditionModel:
    """The blocks of the x4 upscaler's: cross-attention alone in all levels but the last."""
    with torch.random.fork_rng([]):
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=7,
            out_channels=4,
            block_out_channels=(32, 32, 64),
            layers_per_block=1,
            only_cross_attention=(True, True, False),  # pyright: ignore[reportArgumentType]
            attention_head_dim=8,
            cross_attention_dim=WIDTH,
            use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            num_class_embeds=1000,
        )
    return draw_weights(unet, 0).requires_grad_(False)


UNETS: dict[str, Callable[[], UNet2DConditionModel]] = {
    "table": lambda: tiny_unet(7, labels="table"),
    "waves": lambda: tiny_unet(7, labels="waves"),
    "as published": upscaler_unet,
}


def theirs_in(folder: Path, unet: UNet2DConditionModel, **noising: Any) -> Path:
    """A model as diffusers itself writes it."""
    bundle = tiny_upscaler()
    scheduler = DDIMScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    theirs: Any = StableDiffusionUpscalePipeline
    theirs(
        vae=vae_of(bundle),
        text_encoder=tower_of(bundle).model,
        tokenizer=tower_of(bundle).tokenizer,
        unet=unet,
        low_res_scheduler=DDPMScheduler(**noising),
        scheduler=scheduler,
    ).save_pretrained(folder)
    return folder


def small(seed: int = 3) -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def draw_theirs(folder: Path, level: int, scale: float) -> Tensor:
    pipe: Any = DiffusionPipeline.from_pretrained(folder)  # of the class that the index names
    assert type(pipe) is StableDiffusionUpscalePipeline
    pipe.set_progress_bar_config(disable=True)
    drawn: Any = pipe(
        PROMPTS,
        image=small() / 2 + 0.5,  # it takes tensors of [0, 1]
        negative_prompt=NEGATIVES,
        noise_level=level,
        latents=noise(),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        guidance_scale=scale,
        num_inference_steps=6,
        output_type="latent",
    )
    return drawn.images


def network_of(bundle: Bundle) -> UpscalingUNet:
    assert isinstance(bundle.network, UpscalingUNet)
    return bundle.network


def draw_ours(bundle: Bundle, edit: Enlarge, scale: float = 4.0, prompts: Any = PROMPTS) -> Tensor:
    pipe = LatentDiffusionPipeline(bundle)
    drawn: Any = pipe(
        prompts,
        negative_prompt=NEGATIVES,
        edits=[edit],
        latents=noise(),
        seed=SEEDS,
        guidance_scale=scale,
        num_inference_steps=6,
        output_type="latent",
        progress=False,
    )
    return drawn.latents


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "level", "scale"),
    [("table", 20, 5.0), ("table", 0, 1.0), ("waves", 349, 5.0), ("as published", 20, 5.0)],
)
def test_a_folder_of_diffusers_draws_the_same_and_so_does_it_saved(
    kind: str, level: int, scale: float, tmp_path: Path
) -> None:
    folder = theirs_in(tmp_path / "theirs", UNETS[kind](), beta_schedule="scaled_linear")
    bundle = Bundle.load(folder)
    assert bundle.kind == "upscaling"
    ours = draw_ours(bundle, Enlarge(small(), level), scale)
    assert ours.std() > 0.3
    assert (ours - draw_theirs(folder, level, scale)).abs().max() <= TOLERANCE
    again = bundle.save(tmp_path / "ours")
    assert (ours - draw_theirs(again, level, scale)).abs().max() <= TOLERANCE
    assert torch.equal(draw_ours(Bundle.load(again), Enlarge(small(), level), scale), ours)


@torch.no_grad()
def test_all_that_an_upscaler_is_told_moves_what_it_draws(tmp_path: Path) -> None:
    """So that equal latents prove that both sides were told the same."""
    bundle = Bundle.load(theirs_in(tmp_path / "theirs", UNETS["table"]()))
    network = network_of(bundle)
    drawn = draw_ours(bundle, Enlarge(small(), 20))
    made = replace(network.made, process=processes.create("vp-scaled-linear"))
    noisy = replace(bundle, network=replace(network, made=made))
    others = {
        "picture": draw_ours(bundle, Enlarge(small(4), 20)),
        "one of two": draw_ours(bundle, Enlarge(torch.cat([small()[:1], small(4)[1:]]), 20)),
        "level": draw_ours(bundle, Enlarge(small(), 120)),
        "prompts": draw_ours(bundle, Enlarge(small(), 20), prompts=PROMPTS[::-1]),
    }
    for name, other in others.items():
        assert (other - drawn)[1].abs().max() > 0.05, name
    assert (draw_ours(noisy, Enlarge(small(), 120)) - others["level"])[1].abs().max() > 0.05


def test_the_scale_of_latents_is_the_pipelines_own(tmp_path: Path) -> None:
    """StableDiffusionUpscalePipeline decodes with 0.08333, whatever the file says."""
    folder = theirs_in(tmp_path / "theirs", UNETS["table"]())
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "scaling_factor": 0.5}))
    assert Bundle.load(folder).autoencoder.scaling_factor == 0.08333


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("model_index.json", {"max_noise_level": 1000}, "max_noise_level"),
        ("model_index.json", {"max_noise_level": "9"}, "max_noise_level"),
        ("model_index.json", {"latentdiff_ratio": 3}, "latentdiff_ratio"),
        ("low_res_scheduler/scheduler_config.json", {"beta_schedule": "x"}, "low_res_scheduler"),
        ("unet/config.json", {"class_embed_type": "projection"}, "class_embed_type"),
        ("unet/config.json", {"num_class_embeds": None}, "class_embedding"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused_by_name(
    file: str, change: dict[str, object], told: str, tmp_path: Path
) -> None:
    folder = theirs_in(tmp_path / "theirs", UNETS["table"]())
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=told):
        Bundle.load(folder)


def test_a_model_that_enlarges_by_nothing_is_refused(tmp_path: Path) -> None:
    """Of pixels without a transform the least ratio is not the autoencoder's factor, 1."""
    made = LowResolution(processes.create("vp-linear"), 350, 2)
    unet = tiny_unet(6, 3, labels="table").requires_grad_(False)
    pixels = PixelAutoencoder(HaarTransform({"levels": 0}).requires_grad_(False))
    bundle = replace(tiny_upscaler(), autoencoder=pixels, network=UpscalingUNet(unet, 3, made))
    folder = bundle.save(tmp_path / "model")
    low = Bundle.load(folder).network.low_resolution
    assert low is not None
    assert low.ratio == 2
    path = folder / "model_index.json"
    config = json.loads(path.read_text())
    del config["latentdiff_ratio"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="latentdiff_ratio must be a whole number from 2"):
        Bundle.load(folder)


def test_a_model_of_another_ratio_is_saved_with_it_and_not_for_diffusers(tmp_path: Path) -> None:
    bundle = tiny_upscaler("waves")
    network = network_of(bundle)
    wide = replace(bundle, network=replace(network, made=replace(network.made, ratio=4)))
    folder = wide.save(tmp_path / "model")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == (
        "LatentDiffusionPipeline"
    )
    again = Bundle.load(folder)
    assert again.network.low_resolution is not None
    assert again.network.low_resolution.ratio == 4
    with pytest.raises(UserError, match="saved as a folder"):
        wide.save(tmp_path / "model.safetensors")

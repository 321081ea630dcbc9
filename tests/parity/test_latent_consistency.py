"""Networks that are told their guidance scale draw the pixels of diffusers' pipelines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from tiny import tiny_bundle, tiny_xl, tower_of, unet_of, vae_of, with_own_networks
from torch import Tensor

from latentdiff import Instruct, LatentDiffusionPipeline, UserError
from latentdiff.bundle import Bundle, Steps
from latentdiff.learning.denoising import Conditioned
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.models.guidance_embedding import embedded_scale

TOLERANCE = 1e-4  # of pixels in [0, 1]; the largest seen is 2e-6
SEED, WIDTH = 3, 32
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
}
SCHEDULERS: dict[str, Any] = {
    "lcm": lambda: LCMScheduler(**SCHEDULE),
    "ddim": lambda: DDIMScheduler(**SCHEDULE, steps_offset=1),
    "dpmpp-2m": lambda: DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ),
}


def noise() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def theirs_of(bundle: Bundle, solver: str) -> Any:
    """Their own pipeline for such networks knows the one scheduler that it was made for."""
    kind: Any = LatentConsistencyModelPipeline if solver == "lcm" else StableDiffusionPipeline
    return kind(
        vae=vae_of(bundle),
        text_encoder=tower_of(bundle).model,
        tokenizer=tower_of(bundle).tokenizer,
        unet=unet_of(bundle),
        scheduler=SCHEDULERS[solver](),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw(pipe: LatentDiffusionPipeline, **more: Any) -> np.ndarray:
    given: dict[str, Any] = {"latents": noise(), "seed": SEED, "output_type": "np"}
    given |= {"progress": False, "num_inference_steps": 4} | more
    return pipe("a red heart", **given).images


@torch.no_grad()
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_the_scale_is_told_in_one_pass_a_step(solver: str, tmp_path: Path) -> None:
    """A folder of diffusers, opened here, and saved as a file; at two scales, and at theirs."""
    made = tiny_bundle(guidance_width=WIDTH, prediction="eps")
    theirs = theirs_of(made, solver)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "folder")
    opened = Bundle.load(tmp_path / "folder")
    assert isinstance(opened.network.module, CrossAttentionUNet)
    assert opened.solver == solver
    pipe = LatentDiffusionPipeline(Bundle.load(opened.save(tmp_path / "one.safetensors")))
    pictures = {}
    for scale in (1.0, 4.0, 8.5):
        random = torch.Generator().manual_seed(SEED)
        wanted = theirs(
            "a red heart",
            num_inference_steps=4,
            guidance_scale=scale,
            latents=noise(),
            generator=random,
            output_type="np",
        ).images
        pictures[scale] = draw(pipe, guidance_scale=scale)
        assert np.abs(pictures[scale] - wanted).max() <= TOLERANCE
    assert np.abs(pictures[4.0] - pictures[8.5]).max() > 0.05
    assert np.abs(pictures[1.0] - pictures[8.5]).max() > 0.05
    assert np.array_equal(draw(pipe), pictures[8.5])  # theirs, where none is said
    assert pipe("a red heart", num_inference_steps=4, progress=False).nfe == 4


@torch.no_grad()
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_so_it_is_in_stable_diffusion_xl(solver: str, tmp_path: Path) -> None:
    made = tiny_xl(guidance_width=WIDTH)
    theirs: Any = StableDiffusionXLPipeline.from_pretrained(made.save(tmp_path / "model"))
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = SCHEDULERS[solver]()
    theirs.save_pretrained(tmp_path / "theirs")
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "theirs")
    assert pipe.bundle.network.guidance_width == WIDTH
    pictures: list[np.ndarray] = []
    for scale in (2.0, 8.5):
        random = torch.Generator().manual_seed(SEED)
        call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": scale}
        call |= {"latents": noise(), "generator": random, "output_type": "np"}
        wanted = theirs("a red heart", **call).images
        pictures.append(draw(pipe, guidance_scale=scale))
        assert np.abs(pictures[-1] - wanted).max() <= TOLERANCE
    assert np.abs(pictures[0] - pictures[1]).max() > 0.02


def test_the_embedding_is_that_of_diffusers() -> None:
    for width in (32, 257):
        theirs: Any = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        wanted = theirs(None, torch.tensor([0.0, 7.5, 2.3]), embedding_dim=width)
        assert torch.equal(embedded_scale([1.0, 8.5, 3.3], width), wanted)


def test_what_such_a_network_cannot_obey_is_refused() -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle(guidance_width=WIDTH))
    for name, value in {
        "negative_prompt": "a hat",
        "also": ["a hat:0.5"],
        "guidance": "apg",
        "guidance_rescale": 0.5,
        "guidance_interval": (0.3, 5.0),
    }.items():
        with pytest.raises(UserError, match=rf"^{name}: .* distilled .* leave it out"):
            draw(pipe, **{name: value})
    draw(pipe, negative_prompt="")  # as programs send it that have a field for it
    told = tiny_bundle(guidance_width=WIDTH, in_channels=8)
    with pytest.raises(UserError, match=r"^image_guidance_scale: "):
        draw(LatentDiffusionPipeline(told), edits=[Instruct(noise())])
    plain = pipe.bundle.conditioner.encode(["a"], (16, 16)).condition
    with pytest.raises(UserError, match="time_cond_proj_dim"):  # never in silence
        pipe.bundle.network(noise(), torch.ones(1), plain)


def test_it_is_guided_perturbed_inverted_and_trained_like_others() -> None:
    """At its own scale; packed, too."""
    bundle = with_own_networks(tiny_bundle(guidance_width=WIDTH, steps=Steps("leading", 1)))
    pipe = LatentDiffusionPipeline(bundle)
    plain = draw(pipe)
    assert np.abs(draw(pipe, edits=["pag:3"]) - plain).max() > 0.01
    picture = pipe("a red heart", progress=False).images
    assert isinstance(picture, list)
    assert bool(pipe.invert(picture[0], "a red heart", num_inference_steps=4).isfinite().all())
    text = bundle.conditioner.states(bundle.conditioner.tokenize(["a red heart"]))
    module, x, t = Conditioned(bundle), noise(), torch.full((1,), 500.0)
    got = module(x, t, text)
    condition = replace(
        bundle.conditioner.condition(text, (16, 16)),
        guidance_embedding=embedded_scale([8.5], WIDTH),
    )
    assert torch.equal(got, bundle.network(x, t, condition))

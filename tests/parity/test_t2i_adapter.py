"""Pixels equal to diffusers' T2I-Adapter pipelines, and maps to its U-Net's, on tiny weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.adapter import T2IAdapter
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.t2i_adapter.pipeline_stable_diffusion_adapter import (
    StableDiffusionAdapterPipeline,
)
from diffusers.pipelines.t2i_adapter.pipeline_stable_diffusion_xl_adapter import (
    StableDiffusionXLAdapterPipeline,
)
from diffusers_runs import SCHEDULERS, noise, ours, parts, picture, same, stable_diffusion, theirs
from tiny import draw_weights, tiny_t2i_adapter, tiny_xl, with_own_networks

from latentdiff import Control
from latentdiff.bundle import Bundle
from latentdiff.models.cross_attention_unet import CrossAttentionUNet

STEPS = 4
PROMPTS = ["a red heart", "a cat"]
# The adapters' configs, what a control is told besides, and the call.
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "full": ([{}], {}, {"guidance_scale": 5.0}),
    "light, of grey pictures, weak": (
        [{"adapter_type": "light_adapter", "channels": [32], "in_channels": 1}],
        {"scale": 0.6},
        {"guidance_scale": 1.0},
    ),
    "two": ([{}, {"num_res_blocks": 1}], {"scale": 0.7}, {"guidance_scale": 5.0}),
}


def saved(place: Path, configs: list[dict[str, Any]]) -> list[Path]:
    """Adapters as diffusers saves them."""
    folders = [place / str(number) for number in range(len(configs))]
    for number, (folder, config) in enumerate(zip(folders, configs, strict=True)):
        tiny_t2i_adapter(seed=50 + number, **config).save_pretrained(folder)
    return folders


def check(
    pipe: Any, bundles: list[Bundle], controls: list[list[Control]], told: Any, call: Any
) -> None:
    """Ours are theirs with every solver and U-Net; and pictures and scales are seen."""
    own, *others = controls
    call = call | {"num_inference_steps": STEPS}
    for solver in SCHEDULERS:
        wanted = theirs(pipe, solver, **told | call)
        for bundle in bundles:
            same(ours(bundle, solver, controls=own, **call), wanted)
        if solver == "ddim":
            for other in others:
                changed = ours(bundles[0], solver, controls=other, **call)
                assert np.abs(changed - wanted).max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_diffusers(case: str, tmp_path: Path) -> None:
    """Its U-Net or ours; a picture for each of two prompts, of a second adapter one for both."""
    configs, settings, call = CASES[case]
    folders = saved(tmp_path, configs)
    bundle = stable_diffusion()
    loaded: Any = [T2IAdapter.from_pretrained(folder) for folder in folders]
    mode = "L" if configs[0].get("in_channels") == 1 else "RGB"
    images: list[Any] = [[picture(n, mode=mode) for n in (0, 1)], [picture(2)] * 2][: len(folders)]
    several = len(folders) > 1
    pipe = StableDiffusionAdapterPipeline(adapter=loaded if several else loaded[0], **parts(bundle))
    scale = settings.get("scale", 1.0)
    told = {
        "image": images if several else images[0],
        "adapter_conditioning_scale": [scale] * 2 if several else scale,
    }
    own = [
        Control(folder, image, **settings) for folder, image in zip(folders, images, strict=True)
    ]
    other = [Control(own[0].loaded, picture(9), **settings), *own[1:]]
    weak = [Control(own[0].loaded, images[0], scale=0.3), *own[1:]]
    call = call | {"prompt": PROMPTS, "latents": noise(2, 4, 8, 8)}
    check(pipe, [bundle, with_own_networks(bundle)], [own, other, weak, own[1:]], told, call)


@torch.no_grad()
def test_pixels_of_stable_diffusion_xl_too(tmp_path: Path) -> None:
    """For a part of the run."""
    folder = tiny_xl().save(tmp_path / "model")
    config = {"adapter_type": "full_adapter_xl", "channels": [16, 32], "downscale_factor": 4}
    (place,) = saved(tmp_path, [config])
    adapter: Any = T2IAdapter.from_pretrained(place)
    pipe = StableDiffusionXLAdapterPipeline.from_pretrained(folder, adapter=adapter)
    told = {"image": picture(1), "adapter_conditioning_factor": 0.6}
    told |= {"adapter_conditioning_scale": 0.8}
    call = {"prompt": PROMPTS[0], "guidance_scale": 4.0, "latents": noise(1, 4, 8, 8)}
    own = Control(place, picture(1), 0.8, end=0.6)
    other, whole = (
        Control(own.loaded, picture(2), 0.8, end=0.6),
        Control(own.loaded, picture(1), 0.8),
    )
    check(pipe, [Bundle.load(folder)], [[own], [other], [whole], []], told, call)


@torch.no_grad()
def test_levels_and_middle_of_the_unet() -> None:
    """The blocks of Stable Diffusion XL, of whose four maps the last is the middle's."""
    with torch.random.fork_rng([]):
        theirs = UNet2DConditionModel(
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=16,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )
    draw_weights(theirs, 3)
    unet = CrossAttentionUNet(dict(theirs.config))
    unet.load_state_dict(theirs.state_dict())
    x, t, states = noise(2, 4, 9, 11), torch.tensor([20.0, 700.0]), noise(2, 5, 16, seed=6)
    shapes = [(16, 5, 6), (32, 5, 6), (32, 3, 3), (32, 3, 3)]
    levels = [noise(2, *shape, seed=n) for n, shape in enumerate(shapes)]
    wanted: Any = theirs(x, t, states, down_intrablock_additional_residuals=[*levels]).sample
    got = unet(x, t, states, down_intrablock_additional_residuals=levels)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    for left_out in range(4):
        fewer = [one * (n != left_out) for n, one in enumerate(levels)]
        other = unet(x, t, states, down_intrablock_additional_residuals=fewer)
        assert (other - got).abs().max() > 0.01 * got.std(), left_out

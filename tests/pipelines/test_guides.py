"""Guides of the pipeline: spoilt attention by hand, nothing left on the U-Net, threads."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny import tiny_bundle, unet_of
from torch import Tensor
from torch.nn.functional import conv2d, pad

from latentdiff import PAG, SEG, LatentDiffusionPipeline
from latentdiff.diffusion.edits import Edit
from latentdiff.errors import UserError
from latentdiff.guidance import projected
from latentdiff.models.perturbation import BlurredQueries, IdentityAttention, blur_matrix

BUNDLE = tiny_bundle()
PROMPTS = ["a red heart", "a sad dog"]


def draw(**arguments: Any) -> Tensor:
    settings = {"num_inference_steps": 3, "seed": 0, "output_type": "latent", "progress": False}
    return LatentDiffusionPipeline(BUNDLE)(PROMPTS, **(settings | arguments)).images


def attention() -> Any:
    layer = dict(unet_of(BUNDLE).named_modules())[
        "mid_block.attentions.0.transformer_blocks.0.attn1"
    ]
    assert isinstance(layer, Attention)
    return layer


def through(layer: Any, x: Tensor, weights: Tensor) -> Tensor:
    """Attention by its definition, with weights [B, heads, N, N]."""
    value = layer.to_v(x).view(*x.shape[:2], layer.heads, -1).transpose(1, 2)
    return (weights @ value).transpose(1, 2).flatten(2)


def test_identity_attention_is_attention_with_the_identity() -> None:
    layer, x = attention(), torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    identity = torch.eye(6).expand(2, layer.heads, 6, 6)
    torch.testing.assert_close(
        IdentityAttention().mix(layer, x, (2, 3)), through(layer, x, identity)
    )


@pytest.mark.parametrize("size", [(4, 5), (7, 3), (1, 4)])
@pytest.mark.parametrize("sigma", [0.4, 1.0, math.inf])
def test_blurred_queries_are_a_convolution_with_reflected_edges(
    size: tuple[int, int], sigma: float
) -> None:
    layer, places = attention(), size[0] * size[1]
    x = torch.randn(2, places, 32, generator=torch.Generator().manual_seed(0))
    query = layer.to_q(x).transpose(1, 2).unflatten(2, size)  # [B, D, h, w]
    if sigma == math.inf:
        query = query.mean((2, 3), keepdim=True).expand_as(query)
    else:
        for axis, side in enumerate(size):
            reach = min(math.ceil(6 * sigma) // 2, side // 2)
            kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1.0) / sigma) ** 2)
            shape = (1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1)
            kernel = (kernel / kernel.sum()).view(shape).repeat(32, 1, 1, 1)
            edges = (0, 0, reach, reach) if axis == 0 else (reach, reach, 0, 0)
            query = conv2d(pad(query, edges, mode="reflect"), kernel, groups=32)
    heads = query.flatten(2).view(2, layer.heads, -1, places).transpose(2, 3)
    key = layer.to_k(x).view(2, places, layer.heads, -1).transpose(1, 2)
    weights = (heads @ key.transpose(2, 3) * layer.scale).softmax(-1)
    got = BlurredQueries(sigma).mix(layer, x, size)
    torch.testing.assert_close(got, through(layer, x, weights), atol=1e-6, rtol=1e-5)


def test_a_blur_keeps_constants_and_a_tiny_one_keeps_all() -> None:
    for side in (1, 2, 5, 8):
        assert (blur_matrix(side, 2.0).sum(1) - 1).abs().max() < 1e-12
        torch.testing.assert_close(blur_matrix(side, 0.05), torch.eye(side).double())


@pytest.mark.parametrize("guide", [PAG(3.0), SEG(3.0), SEG(3.0, blur=0.7)])
@pytest.mark.parametrize("guidance", [{"guidance_scale": 1.0}, {}, {"guidance": "apg"}])
def test_a_guide_changes_the_picture_and_its_scale_0_no_bit(
    guide: PAG | SEG, guidance: dict[str, Any]
) -> None:
    plain = draw(**guidance)
    assert (draw(edits=[guide], **guidance) - plain).abs().max() > 1e-4
    assert torch.equal(draw(edits=[type(guide)(0.0)], **guidance), plain)
    outside = type(guide)(3.0, interval=(1e6, math.inf))
    assert torch.equal(draw(edits=[outside], **guidance), plain)


def test_one_network_call_a_step_and_any_size() -> None:
    pipe = LatentDiffusionPipeline(BUNDLE)
    output = pipe(
        PROMPTS,
        height=10,
        width=22,  # latents of 5 x 11, so the middle is 3 x 6
        num_inference_steps=3,
        edits=[PAG(2.0), SEG(2.0, blur=1.0)],
        num_images_per_prompt=2,
        progress=False,
    )
    assert output.nfe == 3
    assert torch.isfinite(output.latents).all()


def test_pictures_do_not_mix_and_batches_do_not_matter() -> None:
    together = draw(edits=[PAG(3.0)], num_images_per_prompt=2)
    pipe = LatentDiffusionPipeline(BUNDLE)
    alone = pipe(
        PROMPTS[1],
        seed=0,
        first=3,
        num_inference_steps=3,
        edits=[PAG(3.0)],
        output_type="latent",
        progress=False,
    )
    torch.testing.assert_close(alone.images, together[3:], atol=1e-5, rtol=1e-5)


def test_threads_with_different_guides_share_a_pipeline() -> None:
    before = [m.processor for m in unet_of(BUNDLE).modules() if isinstance(m, Attention)]
    kinds: list[list[Edit]] = [[], [PAG(3.0)], [SEG(2.0)], [PAG(1.0, layers=("down_blocks.0",))]]
    serial = [draw(edits=kind) for kind in kinds]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda kind: draw(edits=kind), kinds * 2))
    for kind, picture in enumerate(parallel):
        assert torch.equal(picture, serial[kind % 4])
    after = [m.processor for m in unet_of(BUNDLE).modules() if isinstance(m, Attention)]
    assert all(old is new for old, new in zip(before, after, strict=True))


def test_a_method_of_ones_own() -> None:
    """`guidance` takes a function; APG with momentum starts anew in each call."""
    method = partial(projected, momentum=-0.5, largest=2.0)
    first = draw(guidance=method)
    assert torch.equal(draw(guidance=method), first)
    assert (draw(guidance=partial(projected, largest=2.0)) - first).abs().max() > 1e-5


def test_bad_guides_are_told() -> None:
    with pytest.raises(UserError, match="layer is called 'middle'; there are: do"):
        draw(edits=[PAG(layers=("middle",))])
    with pytest.raises(UserError, match="is no edit"):
        draw(edits=[3.0])
    with pytest.raises(UserError, match="perturbed attention: scale: must be a finite"):
        draw(edits=[SEG(math.inf)])
    for blur in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="blur of SEG must be above 0"):
            SEG(blur=blur)

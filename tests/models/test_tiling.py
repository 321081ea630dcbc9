"""Autoencoders in tiles: what they give is what the whole gives, seams included."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import (
    bundle_of,
    draw_weights,
    tiny_bundle,
    tiny_clip,
    tiny_unet,
    vae_of,
    with_own_networks,
)

from latentdiff.errors import UserError
from latentdiff.models import tiling
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.engines.packed import PackedAutoencoder
from latentdiff.models.vae import build_vae


def deep(kind: Any) -> DiffusersAutoencoder:
    """An autoencoder of three levels."""
    with torch.random.fork_rng([]):
        vae = draw_weights(build_vae(kind, (8, 16, 16), 1, 4, 4, 32, codes=32), 1)
    return DiffusersAutoencoder(vae.requires_grad_(False))


def ours() -> DiffusersAutoencoder:
    with torch.random.fork_rng([]):
        vae = draw_weights(build_vae("kl", (8, 16, 16), 1, 4, 4, 32), 1).requires_grad_(False)
    bundle = bundle_of(vae, tiny_unet(), tiny_clip(), tiny_bundle().process, "v")
    return DiffusersAutoencoder(vae_of(with_own_networks(bundle)))


@pytest.mark.parametrize("kept", [0, 2**30])
@pytest.mark.parametrize("which", ["kl", "vq", "ours"])
@torch.no_grad()
def test_tiles_give_what_the_whole_gives(
    which: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(ours() if which == "ours" else deep(which), tiling="off")
    tiled = replace(whole, tiling="on")
    monkeypatch.setattr(tiling, "_TILE", 32)
    monkeypatch.setattr(tiling, "_LARGE", kept)
    random = torch.Generator().manual_seed(0)
    # Sides that are no multiple of a tile, a quarter of the picture very unlike the rest.
    pictures = torch.rand(2, 3, 84, 116, generator=random) * 2 - 1
    pictures[..., :40, :60] = 0.9
    latents = torch.randn(2, 4, 21, 29, generator=random)
    latents[..., :10, :15] *= 0.1
    assert (tiled.decode(latents) - whole.decode(latents)).abs().max() < 2e-5
    assert (tiled.moments(pictures) - whole.moments(pictures)).abs().max() < 1e-4
    assert torch.equal(tiled.encode(pictures), tiled.encode(pictures))


@torch.no_grad()
def test_large_pictures_alone_are_tiled_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = ours()
    small, large = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 17, 16)
    monkeypatch.setattr(tiling, "_LARGE", 64 * 64 * 16 * 4)
    wanted = replace(auto, tiling="off").decode(large)
    with warnings.catch_warnings(action="error"):
        auto.decode(small)
    with pytest.warns(UserWarning, match="in tiles"):
        assert (auto.decode(large) - wanted).abs().max() < 2e-5
    packed = PackedAutoencoder.of(auto)
    with pytest.warns(UserWarning, match="in tiles"):
        assert (packed.decode(large) - wanted).abs().max() < 2e-4


def test_other_blocks_are_not_tiled() -> None:
    other = deep("kl")
    module: Any = other.module
    module.register_to_config(act_fn="gelu")
    with pytest.raises(UserError, match="cannot be computed in tiles"):
        replace(other, tiling="on")

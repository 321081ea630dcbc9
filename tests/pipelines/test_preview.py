"""Previews: the best linear map from latents to colours, without decoding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_bundle
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from latentdiff import Bundle, LatentDiffusionPipeline, Request
from latentdiff.cli import main
from latentdiff.models import preview
from latentdiff.pictures import open_picture


class Averages:
    """An autoencoder whose latents are three mixes of the mean colours of 4 x 4 pixels."""

    factor, channels = 4, 3
    module = torch.nn.Identity()
    mix = torch.tensor([[0.5, 0.2, 0.0], [-0.3, 0.4, 0.1], [0.2, 0.0, 0.6]])

    def encode(self, pictures: Tensor) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", avg_pool2d(pictures, 4), self.mix) + 0.25

    def decode(self, latents: Tensor) -> Tensor:
        means = torch.einsum("bchw,cd->bdhw", latents - 0.25, self.mix.inverse())
        return means.repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_a_linear_autoencoder_is_shown_exactly() -> None:
    autoencoder = Averages()
    pictures = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shown = preview.preview(autoencoder, autoencoder.encode(pictures))  # pyright: ignore
    assert (shown - avg_pool2d(pictures, 4)).abs().max() < 1e-4


def test_the_bundled_model_is_shown_as_well_as_a_line_can() -> None:
    """Against the colours of what is decoded; the same for grey would be off by twice as much."""
    bundle = Bundle.load(device="cpu")
    pipe = LatentDiffusionPipeline(bundle)
    words = ["a red heart", "a green apple", "a blue whale"]
    drawn = pipe(words, seed=0, num_inference_steps=6, output_type="pt", progress=False)
    wanted = avg_pool2d(drawn.images * 2 - 1, 16)
    error = (preview.preview(bundle.autoencoder, drawn.latents) - wanted).square().mean().sqrt()
    spread = wanted.std()
    assert error < 0.65 * spread
    assert pipe.preview(drawn.latents)[0].size == (8, 8)


def test_a_run_shows_its_estimate_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle()
    preview.colours(bundle.autoencoder)
    run = LatentDiffusionPipeline(bundle).prepare(
        Request(prompt=["a cat", "a dog"], height=16, width=24, num_inference_steps=3, seed=0)
    )
    decoded: list[int] = []
    whole: Any = bundle.autoencoder.module.decode

    def decode(latents: Tensor) -> Tensor:
        decoded.append(1)
        return whole(latents)

    monkeypatch.setattr(bundle.autoencoder.module, "decode", decode)
    for _ in run.steps():
        images = run.preview("pt", quick=True)
        assert isinstance(images, Tensor)
        assert images.shape == (2, 3, 16, 24)
        assert run.x0 is not None
        small = preview.preview(bundle.autoencoder, run.x0)
        large = interpolate(small, scale_factor=2.0, mode="bilinear") / 2 + 0.5
        assert (images - large.clamp(0, 1)).abs().max() < 1e-5
    assert not decoded


def test_the_command_writes_what_it_draws_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentdiff import files

    seen: list[Path] = []
    write = files.write_bytes
    shown = tmp_path / "now.png"

    def watched(path: Path, data: bytes, *, replace: bool) -> None:
        seen.append(path)
        write(path, data, replace=replace)

    monkeypatch.setattr("latentdiff.pictures.write_bytes", watched)
    out = ["-o", str(tmp_path), "--model", str(tiny_bundle().save(tmp_path / "model"))]
    asked = ["generate", "a cat", "-n", "2", "--steps", "3", "--seed", "1", *out]
    assert main([*asked, "--preview", str(shown)]) == 0
    assert seen == [shown] * 3
    assert open_picture(shown).size == (32, 16)
    assert main([*asked, "--preview", str(tmp_path / "now.jpg")]) == 2

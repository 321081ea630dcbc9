"""Tiny autoencoders (TAESD): diffusers' numbers, every layout of their files, and previews."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import save_file
from tiny import draw_weights, tiny_bundle, tiny_xl
from torch import Tensor

from latentdiff import Bundle, LatentDiffusionPipeline, Request, load_autoencoder
from latentdiff.bundle import Steps
from latentdiff.cli import main
from latentdiff.cli.options import RunOptions
from latentdiff.errors import UserError
from latentdiff.models import tiling
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.tiny_autoencoder import TinyAutoencoder
from latentdiff.pictures import open_picture

TWO = {  # levels, as the tests' tiny models have
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (12, 12),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
}
PICTURES = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def theirs(**config: Any) -> AutoencoderTiny:
    with torch.random.fork_rng([]):
        return draw_weights(AutoencoderTiny(**config), 3).requires_grad_(False)


def ours(network: AutoencoderTiny) -> TinyAutoencoder:
    own = TinyAutoencoder(json.loads(network.to_json_string()))
    own.load_state_dict(network.state_dict())
    return own.requires_grad_(False)


def two(**config: Any) -> DiffusersAutoencoder:
    return DiffusersAutoencoder(ours(theirs(**TWO, **config)))


def published(state: dict[str, Tensor], prefix: str = "") -> dict[str, dict[str, Tensor]]:
    """The tensors of both sides by TAESD's own names, written out from its layers.

    An encoder: conv, blocks, conv of stride 2, ..., conv. A decoder: limit, conv, ReLU, blocks,
    Upsample, conv, ..., conv. diffusers has both sequences without the limit.
    """
    sides: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, value in state.items():
        side, _, place, *rest = name.split(".")
        moved = int(place) + (side == "decoder")
        sides[side][".".join([f"{prefix and prefix + side + '.'}{moved}", *rest])] = value
    return sides


def write_published(folder: Path, network: AutoencoderTiny, name: str = "taesd") -> Path:
    for side, values in published(network.state_dict()).items():
        save_file(values, folder / f"{name}_{side}.safetensors")
    return folder / f"{name}_decoder.safetensors"


@pytest.mark.parametrize("config", [{}, TWO, {"latent_channels": 16, "scaling_factor": 1.5}])
def test_it_is_that_of_diffusers(config: dict[str, Any]) -> None:
    """To the bit, and each latent moves the picture."""
    network = theirs(**config)
    own = ours(network)
    assert own.config == {
        k: v for k, v in json.loads(network.to_json_string()).items() if k[0] != "_"
    }
    encoded: Any = network.encode(PICTURES)
    latents = encoded.latents * 4  # the limit is felt
    decoded: Any = network.decode(latents)
    assert torch.equal(own.encode(PICTURES), encoded.latents)
    assert torch.equal(own.decode(latents), decoded.sample)
    for channel in range(latents.shape[1]):
        changed = latents.clone()
        changed[:, channel] *= -1
        assert (own.decode(changed) - decoded.sample).std() > 0.02 * decoded.sample.std()


def test_names_are_those_that_are_published(tmp_path: Path) -> None:
    """A part of the lists of taesd_encoder.safetensors and taesd_decoder.safetensors."""
    sides = published(ours(theirs()).state_dict())
    for side, names in {
        "encoder": ("0.weight", "1.conv.4.bias", "2.weight", "6.weight", "10.weight", "14.bias"),
        "decoder": ("1.weight", "3.conv.0.weight", "7.weight", "12.weight", "17.weight", "19.bias"),
    }.items():
        assert set(names) <= sides[side].keys()
    assert "2.bias" not in sides["encoder"]
    assert "7.bias" not in sides["decoder"]


LAYOUTS = ["folder", "diffusers file", "no config", "decoder", "encoder", "comfy"]


def written(folder: Path, layout: str, network: AutoencoderTiny) -> Path:
    """A tiny autoencoder in a layout."""
    if layout in ("decoder", "encoder"):
        write_published(folder, network, "taesd")
        return folder / f"taesd_{layout}.safetensors"
    if layout == "comfy":
        sides = published(network.state_dict(), "taesd_")
        scale = {"vae_scale": torch.tensor([0.18215]), "vae_shift": torch.tensor([0.0])}
        save_file({**sides["encoder"], **sides["decoder"], **scale}, folder / "tiny.safetensors")
        return folder / "tiny.safetensors"
    network.save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    if layout == "no config":
        (folder / "config.json").unlink()
    return folder if layout == "folder" else file


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_of_its_files_is_read(layout: str, tmp_path: Path) -> None:
    network = theirs()
    where = written(tmp_path, layout, network)
    read = load_autoencoder(where)
    encoded: Any = network.encode(PICTURES)
    assert isinstance(read.module, TinyAutoencoder)
    assert (read.factor, read.channels) == (8, 4)
    decoded: Any = network.decode(encoded.latents)
    assert (read.encode(PICTURES) - encoded.latents).abs().max() < 1e-5
    assert (read.decode(encoded.latents) - decoded.sample).abs().max() < 1e-5


def test_a_scale_of_comfyui_is_obeyed(tmp_path: Path) -> None:
    """Its TAESD computes (x - shift) * scale, of x = latents / the scale of the model's own."""
    network = theirs()
    sides = published(network.state_dict(), "taesd_")
    numbers = {"vae_scale": torch.tensor([0.5]), "vae_shift": torch.tensor([0.2])}
    save_file({**sides["encoder"], **sides["decoder"], **numbers}, tmp_path / "a.safetensors")
    latents = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    wanted: Any = network.decode((latents / 0.18215 - 0.2) * 0.5)
    read = load_autoencoder(tmp_path / "a.safetensors")
    assert (read.decode(latents) - wanted.sample).abs().max() < 1e-5
    assert (read.encode(read.decode(latents)).std() > 0).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"act_fn": "gelu"}, "act_fn gelu"),
        ({"upsampling_scaling_factor": 3}, "upsampling_scaling_factor 3"),
        ({"upsample_fn": "bilinear"}, "upsample_fn bilinear"),
        ({"decoder_block_out_channels": [12, 16]}, "decoder_block_out_channels"),
        ({"num_decoder_blocks": [2, 1, 1]}, "num_decoder_blocks"),
        ({"num_encoder_blocks": [1, 3]}, "not in the weights"),
        ({"num_encoder_blocks": 3}, "num_encoder_blocks is 3"),
        ({"num_encoder_blocks": [3000, -2999]}, "num_encoder_blocks .3000, -2999."),
        ({"num_encoder_blocks": [3000, 1]}, "asks for 3008 layers"),
        ({"num_encoder_blocks": [0] * 3000, "num_decoder_blocks": [0] * 3000,
          "encoder_block_out_channels": [8] * 3000, "decoder_block_out_channels": [12] * 3000,
          "block_out_channels": [12] * 3000},
         "asks for 6000 layers"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"in_channels": 4}, "in_channels|should be"),
        ({"middle": True}, "middle True"),
    ],
)  # fmt: skip
def test_others_of_its_class_are_refused_by_name(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    theirs(**TWO).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=told) as caught:
        load_autoencoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_place_of_thousands_of_digits_is_none(tmp_path: Path) -> None:
    values = theirs().state_dict() | {f"encoder.layers.{'9' * 5000}.weight": torch.ones(1)}
    save_file(values, tmp_path / "tiny.safetensors")
    with pytest.raises(UserError, match="in the weights, but not in this network"):
        load_autoencoder(tmp_path / "tiny.safetensors")


def test_half_of_it_is_refused(tmp_path: Path) -> None:
    file = write_published(tmp_path, theirs())
    (tmp_path / "taesd_encoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"taesd_encoder.safetensors must lie beside it"):
        load_autoencoder(file)
    with pytest.raises(UserError, match="name it taesd_encoder"):
        load_autoencoder(file.rename(tmp_path / "mine.safetensors"))


def test_latents_are_scaled_as_pipelines_of_diffusers_do() -> None:
    """They multiply what is encoded by the scaling factor, and divide before they decode."""
    network = theirs(**TWO, scaling_factor=1.5)
    autoencoder = DiffusersAutoencoder(ours(network))
    encoded: Any = network.encode(PICTURES)
    latents = encoded.latents * 1.5
    decoded: Any = network.decode(latents / 1.5)
    assert (autoencoder.encode(PICTURES) - latents).abs().max() < 1e-5
    assert (autoencoder.decode(latents) - decoded.sample).abs().max() < 1e-5
    moments = autoencoder.moments(PICTURES)  # no spread: what training draws is what is encoded
    assert (autoencoder.draw(moments, torch.ones(2, 4, 16, 24)) - latents).abs().max() < 1e-5


def test_models_with_it_draw_as_in_diffusers(tmp_path: Path) -> None:
    """In place of the model's own, and saved with it and opened there."""
    steps = Steps("trailing")
    folder = replace(tiny_bundle(steps=steps), solver="ddim").save(tmp_path / "model")
    bundle = Bundle.load(folder, vae=written(tmp_path, "folder", theirs(**TWO)))
    pipe: Any = StableDiffusionPipeline.from_pretrained(bundle.save(tmp_path / "with it"))
    assert isinstance(pipe.vae, AutoencoderTiny)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    about: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "np"}
    wanted = pipe("a cat", latents=noise, **about).images
    drawn, own = (
        LatentDiffusionPipeline(one)("a cat", latents=noise, progress=False, **about).images
        for one in (Bundle.load(tmp_path / "with it"), Bundle.load(folder))
    )
    assert drawn.std() > 0.05
    assert np.abs(drawn - wanted).max() < 1e-4
    assert np.abs(drawn - own).max() > 0.05


def test_its_latents_say_nothing_of_anothers_scale(tmp_path: Path) -> None:
    """InstructPix2Pix is shown latents before they are scaled, which these never are."""
    folder = tiny_bundle(in_channels=8).save(tmp_path / "model")
    with pytest.raises(UserError, match="InstructPix2Pix"):
        Bundle.load(folder, vae=written(tmp_path, "folder", theirs(**TWO)))


def test_models_of_stable_diffusion_xl_take_it(tmp_path: Path) -> None:
    folder = tiny_xl().save(tmp_path / "model")
    bundle = Bundle.load(folder, vae=written(tmp_path, "folder", theirs(**TWO)), dtype="float16")
    assert next(bundle.autoencoder.module.parameters()).dtype == torch.float16  # it overflows not
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert (bundle.autoencoder.decode(latents) - two().decode(latents)).abs().max() < 0.02


@pytest.mark.parametrize("kept", [0, 2**30])
def test_it_is_tiled_exactly(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_TILE", 32)
    monkeypatch.setattr(tiling, "_LARGE", kept)
    config = {name: (*each, each[-1]) for name, each in TWO.items()}
    whole = DiffusersAutoencoder(ours(theirs(**config)), tiling="off")
    tiled = replace(whole, tiling="on")
    random = torch.Generator().manual_seed(0)
    pictures = torch.rand(1, 3, 136, 88, generator=random) * 2 - 1
    latents = torch.randn(1, 4, 34, 22, generator=random)
    with torch.no_grad():
        assert (tiled.decode(latents) - whole.decode(latents)).abs().max() < 1e-5
        assert (tiled.encode(pictures) - whole.encode(pictures)).abs().max() < 1e-5


def test_previews_are_decoded_by_it_and_leave_the_run_alone() -> None:
    pipe, by = LatentDiffusionPipeline(tiny_bundle()), two()
    request = Request(prompt=["a cat", "a dog"], num_inference_steps=4, seed=0, solver="euler-a")
    plain = pipe.prepare(request).finish("pt")
    run = pipe.prepare(request)
    for _ in run.steps():
        before = run.latents.clone()
        shown = run.preview("pt", by=by)
        assert run.x0 is not None
        assert torch.equal(torch.as_tensor(shown), (by.decode(run.x0) / 2 + 0.5).clamp(0, 1))
        assert torch.equal(run.latents, before)
    output = run.finish("pt")
    assert torch.equal(output.latents, plain.latents)
    assert torch.equal(torch.as_tensor(output.images), torch.as_tensor(plain.images))

    sizes: list[tuple[int, int]] = []

    def watch(_index: int, _level: object, latents: Tensor) -> None:
        sizes.extend(image.size for image in pipe.preview(latents, by=by))

    again = pipe.draw(request, on_move=watch, output_type="pt", progress=False)
    assert sizes == [(16, 16)] * 8
    assert torch.equal(again.latents, plain.latents)


def test_previews_of_other_latents_are_refused() -> None:
    run = LatentDiffusionPipeline(tiny_bundle()).prepare(Request(prompt="a cat", seed=0))
    other = DiffusersAutoencoder(ours(theirs(latent_channels=16)))
    with pytest.raises(UserError, match="latents of 16 channels"):
        run.preview(by=other)
    with pytest.raises(UserError, match="quick"):
        run.preview(by=two(), quick=True)


def test_a_preview_of_latents_of_xl_is_scaled_as_xls(tmp_path: Path) -> None:
    """By ComfyUI's file, which stands for the autoencoder of a model that has a tiny one itself."""
    folder, comfy = tmp_path / "taesdxl", tmp_path / "comfy"
    folder.mkdir()
    comfy.mkdir()
    tiny = written(folder, "folder", theirs(**TWO))
    file = written(comfy, "comfy", theirs(**TWO))
    bundle = Bundle.load(tiny_xl().save(tmp_path / "model"), vae=tiny)
    show = RunOptions(preview=tmp_path / "now.png", preview_vae=str(file)).show(bundle)
    run = LatentDiffusionPipeline(bundle).prepare(
        Request(prompt="a cat", num_inference_steps=3, seed=1)
    )
    run.finish()
    assert show is not None
    show(run)
    shown = np.asarray(open_picture(tmp_path / "now.png")) / 255
    for scale, near in ((0.13025, True), (0.18215, False)):
        wanted = np.asarray(run.preview("np", by=load_autoencoder(file, scale)))[0]
        assert bool(np.abs(shown - wanted).max() < 0.01) is near


def test_the_command_previews_by_it(tmp_path: Path) -> None:
    out = ["-o", str(tmp_path), "--model", str(tiny_bundle().save(tmp_path / "model"))]
    asked = ["generate", "a cat", "--steps", "3", "--seed", "1", *out]
    tiny = str(write_published(tmp_path, theirs(**TWO)))
    assert main(asked) == 0
    shown = tmp_path / "now.png"
    assert main([*asked, "--preview", str(shown), "--preview-vae", tiny]) == 0
    first, second = sorted(tmp_path.glob("*-1.png"))
    assert first.read_bytes() == second.read_bytes()
    bundle = Bundle.load(tmp_path / "model")
    run = LatentDiffusionPipeline(bundle).prepare(
        Request(prompt="a cat", num_inference_steps=3, seed=1)
    )
    run.finish()
    wanted = np.asarray(run.preview("np", by=load_autoencoder(tiny)))[0]
    assert np.abs(np.asarray(open_picture(shown)) / 255 - wanted).max() < 0.02
    assert main([*asked, "--preview-vae", tiny]) == 2

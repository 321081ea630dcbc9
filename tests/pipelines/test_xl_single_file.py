"""Single files of Stable Diffusion XL: names, round trips, diffusers, files of others, refusals."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_xl, xl_like
from torch import Tensor
from xl import NAMES, TEXT, TEXT_2, UNET, VAE

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.bundle import Bundle
from latentdiff.cli import main
from latentdiff.formats import single_file_configs as infer
from latentdiff.formats import single_file_names as ldm
from latentdiff.formats.single_file import part_tensors
from latentdiff.formats.single_file_xl import tensors_of
from latentdiff.models.clip_text import (
    ClipTextConfig,
    ClipTextEncoder,
    ClipTextEncoderWithProjection,
)
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.models.kl_autoencoder import KLAutoencoder

KINDS: dict[str, dict[str, Any]] = {
    "base": {},
    "refiner": {"refiner": True, "zero_empty": False},
    "inpainting": {"in_channels": 9, "prediction": "v"},
}


def tensors(bundle: Bundle) -> dict[str, Tensor]:
    parts = bundle.modules.items()
    return {f"{part}.{n}": v for part, module in parts for n, v in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_names_are_those_of_stabilitys_file() -> None:
    """All 2,515, by networks without memory of its configs; the shapes tell the U-Net's config."""
    with torch.device("meta"):
        networks: dict[str, Any] = {
            "unet": CrossAttentionUNet(UNET),
            "vae": KLAutoencoder(VAE),
            "text_encoder": ClipTextEncoder(ClipTextConfig(**TEXT)),
            "text_encoder_2": ClipTextEncoderWithProjection(ClipTextConfig(**TEXT_2)),
        }
    configs = {name: dict(getattr(n.config, "__dict__", n.config)) for name, n in networks.items()}
    states = {
        part: dict.fromkeys(network.state_dict(), torch.zeros(1, 1))
        for part, network in networks.items()
    }
    names = sorted(tensors_of(states, configs, None))
    digest = hashlib.sha256(json.dumps(names, separators=(",", ":")).encode()).hexdigest()
    assert (len(names), digest) == (2515, NAMES)

    nothing = torch.zeros((), dtype=torch.int8)
    shaped = {n: nothing.expand(v.shape) for n, v in networks["unet"].state_dict().items()}
    stored = part_tensors("unet", shaped, configs["unet"], ldm.UNET, None)
    found = infer.unet_config({name: tuple(v.shape) for name, v in stored.items()}, 128)
    assert {key: found[key] for key in UNET} == UNET


@pytest.mark.parametrize("kind", KINDS)
def test_file_folder_and_diffusers_have_every_bit(kind: str, tmp_path: Path) -> None:
    bundle = tiny_xl(**KINDS[kind])
    folder = bundle.save(tmp_path / "folder")
    file = bundle.save(tmp_path / "one.safetensors")
    opened = Bundle.load(file)
    assert opened.family == bundle.family
    assert (opened.prediction, opened.steps) == (bundle.prediction, bundle.steps)
    assert opened.conditioner.padding == bundle.conditioner.padding
    assert same(tensors(opened), tensors(Bundle.load(folder)))
    again = Bundle.load(opened.save(tmp_path / "two")).save(tmp_path / "two.safetensors")
    assert same(load_file(again), load_file(file))
    opened.save(again)  # a model is replaced
    assert ("v_pred" in load_file(file)) == (kind == "inpainting")

    pipeline = StableDiffusionXLImg2ImgPipeline if kind == "refiner" else StableDiffusionXLPipeline
    theirs: Any = pipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    for name, module in opened.modules.items():
        state = getattr(theirs, name).state_dict()
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
        assert same(dict(module.state_dict()), state), name


def test_a_file_of_others_is_known_by_its_shapes(tmp_path: Path) -> None:
    """As Stability's: no header of ours; the tokenizers lie beside it."""
    bundle = xl_like()
    folder = bundle.save(tmp_path / "folder")
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).rename(tmp_path / name)
    values = load_file(bundle.save(tmp_path / "one.safetensors"))
    bare = tmp_path / "bare.safetensors"
    save_file(values | {"denoiser.sigmas": torch.zeros(3)}, bare)
    opened = Bundle.load(bare)
    assert same(tensors(opened), tensors(bundle))
    assert opened.family == "stable-diffusion-xl"
    assert opened.conditioner.padding == bundle.conditioner.padding
    assert (opened.solver, opened.steps.spacing, opened.size) == ("euler", "leading", (256, 256))
    assert opened.autoencoder.scaling_factor == 0.13025

    def drawn(model: Bundle) -> Tensor:
        call: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "seed": 1}
        pipe = LatentDiffusionPipeline(model)
        return pipe("a red heart", **call, output_type="pt", progress=False).images

    assert torch.equal(drawn(opened), drawn(bundle))
    save_file(values | {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, bare)
    told = Bundle.load(bare)
    assert told.prediction == "v"
    assert told.process.level(told.process.t_max).alpha == 0

    vae = {n.removeprefix(ldm.VAE): v for n, v in values.items() if n.startswith(ldm.VAE)}
    save_file(vae, tmp_path / "vae.safetensors")
    save_file({n: v for n, v in values.items() if not n.startswith(ldm.VAE)}, bare)
    with pytest.raises(UserError, match="holds no autoencoder"):
        Bundle.load(bare)
    given = Bundle.load(bare, vae=tmp_path / "vae.safetensors")
    assert torch.equal(drawn(given), drawn(bundle))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"edm_mean": torch.zeros(4)}, "preconditioned as in EDM"),
        ({f"{ldm.XL_OPEN_CLIP}ln_final.weight": None}, "not in the weights"),
        ({"conditioner.": None}, "does not hold the text encoders of Stable Diffusion XL"),
    ],
)
def test_what_does_not_load_is_one_line(
    change: dict[str, Tensor | None], told: str, tmp_path: Path
) -> None:
    bundle = xl_like()
    folder = bundle.save(tmp_path / "folder")
    values = load_file(bundle.save(tmp_path / "one.safetensors"))
    for name, value in change.items():
        values = {n: v for n, v in values.items() if not n.startswith(name)}
        values |= {} if value is None else {name: value}
    (folder / "tokenizer").rename(tmp_path / "tokenizer")
    (folder / "tokenizer_2").rename(tmp_path / "tokenizer_2")
    bare = tmp_path / "bare.safetensors"
    save_file(values, bare)
    with pytest.raises(UserError, match=told) as caught:
        Bundle.load(bare)
    assert str(caught.value).startswith(str(bare))
    bare.with_suffix(".yaml").write_text("model: {}")
    with pytest.raises(UserError):
        Bundle.load(bare)


def test_the_command_line_converts_both_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_xl().save(tmp_path / "folder")
    file, back = tmp_path / "one.safetensors", tmp_path / "back"
    assert main(["convert", str(folder), str(file)]) == 0
    assert "scaled by 0.7, not 0.13025" in capsys.readouterr().err
    assert main(["convert", str(file), str(back)]) == 0
    for path in sorted(folder.rglob("*.safetensors")):
        assert path.read_bytes() == (back / path.relative_to(folder)).read_bytes()
    assert (folder / "model_index.json").read_text() == (back / "model_index.json").read_text()

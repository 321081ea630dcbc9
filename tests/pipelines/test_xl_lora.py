"""LoRAs of Stable Diffusion XL, of its U-Net and both text encoders, held to diffusers."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file
from tiny import POOLED, WIDTH, WIDTH_2, tiny_bundle, tiny_xl
from torch import Tensor
from xl import UNET

from latentdiff import UserError
from latentdiff.bundle import Bundle
from latentdiff.lora import Layout, Lora, add_lora, attach_lora, load_lora, lora_of, save_lora
from latentdiff.lora.factors import layers
from latentdiff.lora.file import ldm_names
from latentdiff.lora.layers import TARGETS
from latentdiff.models.cross_attention_unet import CrossAttentionUNet

FILE = "pytorch_lora_weights.safetensors"


def made(*, refiner: bool = False) -> Lora:
    """A LoRA as training would leave it: no factor is zero."""
    random = torch.Generator().manual_seed(0)
    bundle = tiny_xl(refiner=refiner)
    for parameter in add_lora(bundle, rank=3, alpha=2.0, targets="all", text_encoder=True):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    return lora_of(bundle)


def answers(unet: Any, encoders: list[Any]) -> list[Tensor]:
    random = torch.Generator().manual_seed(7)
    x = torch.randn(2, 4, 8, 8, generator=random)
    states = torch.randn(2, 12, WIDTH + WIDTH_2, generator=random)
    added = {"text_embeds": states[:, 0, :POOLED], "time_ids": 100 * states[:, 0, :6]}
    ids = torch.randint(0, 500, (2, 12), generator=random)
    with torch.no_grad():
        noise = unet(x, 500, encoder_hidden_states=states, added_cond_kwargs=added)
        said = [encoder(ids, output_hidden_states=True).hidden_states[-2] for encoder in encoders]
        return [getattr(noise, "sample", noise), *said]


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_opens_what_is_saved_here(layout: Layout, tmp_path: Path) -> None:
    """In their text encoders and their U-Net, within rounding."""
    folder = tiny_xl().save(tmp_path / "model")
    path = save_lora(made(), tmp_path / FILE, layout=layout)
    starts = {re.split(r"[_.]", name.replace("text_encoder", "te"))[0] for name in load_file(path)}
    assert starts == ({"lora"} if layout == "kohya" else {"unet", "te"})
    bundle = Bundle.load(folder)
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(folder)

    def both() -> tuple[list[Tensor], list[Tensor]]:
        mine = answers(bundle.network.module, list(bundle.conditioner.modules.values()))
        return mine, answers(pipe.unet, [pipe.text_encoder, pipe.text_encoder_2])

    plain, theirs = both()
    assert all(torch.equal(a, b) for a, b in zip(plain, theirs, strict=True))
    attach_lora(bundle, load_lora(path, bundle), "a")
    pipe.load_lora_weights(tmp_path, weight_name=FILE)
    changed, theirs = both()
    pairs = zip(changed[1:], theirs[1:], strict=True)  # theirs is beside the weights
    assert all(float((a - b).abs().max()) < 2e-5 for a, b in pairs)
    assert float((changed[0] - theirs[0]).abs().max()) <= 1e-5  # sums in another order
    assert all(float((a - b).abs().max()) > 0.05 for a, b in zip(plain, changed, strict=True))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_file_keeps_every_bit(layout: Layout, tmp_path: Path) -> None:
    for refiner in (False, True):
        lora = made(refiner=refiner)
        again = load_lora(
            save_lora(lora, tmp_path / f"{refiner}.safetensors", layout=layout),
            tiny_xl(refiner=refiner),
        )
        assert dict(lora.parts()).keys() == dict(again.parts()).keys()
        for part, factors in lora.parts():
            read = dict(again.parts())[part]
            assert factors.keys() == read.keys()
            for module, pair in factors.items():
                assert torch.equal(pair.down, read[module].down)
                assert torch.equal(pair.up, read[module].up)
                assert pair.alpha == read[module].alpha


def test_kohyas_names_are_those_of_the_first_lora_for_it(tmp_path: Path) -> None:
    """2,364 names: every linear layer and convolution of the U-Net but those that only time, sizes,
    the first input and the output go through, in latent-diffusion's blocks."""
    with torch.device("meta"):
        unet = CrossAttentionUNet(UNET)
    ends = TARGETS["all"]
    chosen = [n for n in layers(unet) if any(f".{n}".endswith(f".{end}") for end in ends)]
    outside = {"conv_in", "conv_out"}
    outside |= {f"{e}_embedding.linear_{n}" for e in ("time", "add") for n in (1, 2)}
    assert set(chosen) == layers(unet).keys() - outside
    assert 3 * len(chosen) == 2364
    known = ldm_names(unet)
    assert known[chosen[0]].startswith("input_blocks.1.0")
    names = load_file(save_lora(made(), tmp_path / FILE, layout="kohya"))
    starts = ("lora_unet_", "lora_te1_text_model_encoder_", "lora_te2_text_model_encoder_")
    assert all(name.startswith(starts) for name in names)
    blocks = {name.split("_")[2] for name in names if name.startswith("lora_unet_")}
    assert blocks == {"input", "middle", "output"}


def test_a_lora_of_xl_is_no_lora_of_version_1(tmp_path: Path) -> None:
    path = save_lora(made(), tmp_path / FILE)
    with pytest.raises(UserError, match="is of Stable Diffusion XL, and this model is not"):
        load_lora(path, tiny_bundle())

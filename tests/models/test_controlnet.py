"""ControlNets beside diffusers' own: the same numbers to the last bit, and the same files."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from safetensors.torch import load_file, save_file
from tiny import WIDTH, draw_weights, sd_unet, tiny_bundle, tiny_control, tiny_unet
from torch import Tensor
from xl import UNET

from latentdiff import UserError
from latentdiff.diffusion.condition import Condition, Hint, joined
from latentdiff.formats import single_file_names as ldm
from latentdiff.formats.controlnet import load_controlnet, save_controlnet
from latentdiff.formats.single_file import part_tensors
from latentdiff.models.control import ControlNetwork, residuals
from latentdiff.models.control_fit import check_control
from latentdiff.models.controlnet import ControlNet
from latentdiff.models.cross_attention_unet import CrossAttentionUNet

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "blue first": {"controlnet_conditioning_channel_order": "bgr"},
    "pooled": {"global_pool_conditions": True},
    "of sizes and pooled text": {"sizes": True},
    "small": {"sizes": True, "mid_block_type": "UNetMidBlock2D"},
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def own(theirs: ControlNetModel) -> ControlNetwork:
    config = json.loads(theirs.to_json_string())
    assert ControlNet.understands(config)
    module = ControlNet(config)
    module.load_state_dict(theirs.state_dict())
    return ControlNetwork(module.eval().requires_grad_(False))


@torch.no_grad()
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_diffusers_says(kind: str, guess: bool) -> None:
    theirs = tiny_control(**KINDS[kind])
    control, x, states = own(theirs), noise(2, 4, 9, 7), noise(2, 5, WIDTH, seed=1)
    picture, t = noise(2, 3, 18, 14, seed=2).sigmoid(), torch.tensor([20.0, 700.0])
    added = {"text_embeds": noise(2, WIDTH, seed=3), "time_ids": 100 * noise(2, 6, seed=4)}
    wanted = theirs(
        x, t, states, picture, 0.7, added_cond_kwargs=added, guess_mode=guess, return_dict=False
    )
    hint = Hint(control, control.embed(picture), torch.full((2,), 0.7), guess=guess)
    told = control(x, t, states, None, added, hint)
    assert not told.levels
    for ours, other in zip(told.skips, [*wanted[0], wanted[1]], strict=True):
        assert (ours - other).abs().max() <= 1e-6 * other.abs().max()
    assert told.skips[-1].std() > 0.01


@torch.no_grad()
def test_each_row_has_its_own_strength_and_a_hint_its_times() -> None:
    """Rows of no strength are not computed, and add zeros; two controls add up."""
    control, other = own(tiny_control()), own(tiny_control(seed=11))
    x, states, picture = noise(3, 4, 8, 8), noise(3, 5, WIDTH, seed=1), noise(3, 3, 16, 16)
    t = torch.tensor([100.0, 400.0, 700.0])
    whole = Hint(control, control.embed(picture), torch.tensor([0.5, 0.0, 1.0]))
    late = Hint(other, other.embed(picture), torch.ones(3), window=(100.0, 400.0))

    def said(*hints: Hint) -> Sequence[Tensor]:
        told = residuals(Condition(states=states, control=hints), x, t, None)
        assert told is not None
        return told.skips

    for both, first, second in zip(said(whole, late), said(whole), said(late), strict=True):
        assert torch.equal(both, first + second)
        assert not first[1].any()
        assert first[0].any()
        assert not second[[0, 2]].any()
        assert second[1].any()
    never = replace(late, window=(700.0, 900.0))
    assert residuals(Condition(states=states, control=(never,)), x, t, None) is None
    rows = [Condition(states=states[[i]], control=(whole.take([i]),)) for i in (0, 1, 2)]
    again = joined(rows)
    assert torch.equal(again.control[0].scale, whole.scale)
    assert torch.equal(again.control[0].embedded[0], whole.embedded[0])
    with pytest.raises(UserError, match="same controls"):
        joined([rows[0], Condition(states=states[[1]])])


@torch.no_grad()
def test_files_are_those_of_diffusers_and_lllyasviel(tmp_path: Path) -> None:
    """A folder both ways; a single file that diffusers opens; one of others, by its shapes."""
    theirs = draw_weights(ControlNetModel.from_unet(sd_unet(1)), 7)
    theirs.save_pretrained(tmp_path / "theirs")
    opened = load_controlnet(tmp_path / "theirs")
    folder = save_controlnet(opened, tmp_path / "ours")
    file = save_controlnet(opened, tmp_path / "one.safetensors")
    save_controlnet(opened, file)  # replaces its own kind
    names = load_file(file).keys()
    for name in ("input_hint_block.14.bias", "zero_convs.7.0.weight", "middle_block_out.0.weight"):
        assert f"control_model.{name}" in names
    assert "control_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight" in names
    values = {n.removeprefix("control_model."): v for n, v in load_file(file).items()}
    bare, full = tmp_path / "bare.safetensors", tmp_path / "full.safetensors"
    save_file(values, bare)
    save_file(load_file(file) | {"first_stage_model.x": torch.ones(1)}, full)
    beside = folder / "diffusion_pytorch_model.safetensors"
    again: Any = ControlNetModel.from_pretrained(folder)
    single: Any = ControlNetModel.from_single_file(str(file), config=str(folder))
    with pytest.warns(UserWarning, match=r"left out.*first_stage_model"):
        found = [load_controlnet(full)]
    found += [load_controlnet(path) for path in (folder, file, bare, beside)]
    wanted = theirs.state_dict()
    for network in (again, single, *(one.module for one in found)):
        state = network.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in state.items())
    for one in found:
        heads = one.module.config["attention_head_dim"]
        assert heads == 8 or set(heads) == {8}


XL_KINDS: dict[str, dict[str, Any]] = {  # as diffusers/controlnet-canny-sdxl-1.0, -mid and -small
    "whole": {},
    "middle": {"transformer_layers_per_block": [0, 0, 1]},
    "small": {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", XL_KINDS)
def test_files_of_stable_diffusion_xl_tell_their_config(kind: str, tmp_path: Path) -> None:
    """In lllyasviel's names with Stability's `label_emb`, with the prefix and without; and in those
    of diffusers, as most are published. What each says is what diffusers' says."""
    crossing = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    config: dict[str, Any] = {
        "block_out_channels": [32, 64, 128],
        "down_block_types": crossing,
        "transformer_layers_per_block": [1, 2, 3],
        "attention_head_dim": [1, 1, 2],
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 32,
    }
    config["conditioning_embedding_out_channels"] = [8, 8, 8, 8]
    theirs = tiny_control(
        **config | XL_KINDS[kind],
        layers_per_block=2,
        norm_num_groups=32,
    )
    theirs.save_pretrained(tmp_path / "theirs")
    file = save_controlnet(load_controlnet(tmp_path / "theirs"), tmp_path / "one.safetensors")
    prefixed = load_file(file)
    assert "control_model.label_emb.0.2.bias" in prefixed
    bare = {name.removeprefix("control_model."): value for name, value in prefixed.items()}
    for name, values in {"prefixed": prefixed, "bare": bare, "theirs": theirs.state_dict()}.items():
        save_file(dict(values), tmp_path / f"{name}.safetensors")
    single: Any = ControlNetModel.from_single_file(
        str(tmp_path / "theirs.safetensors"), config=str(tmp_path / "theirs")
    )
    assert torch.equal(single.controlnet_mid_block.weight, theirs.controlnet_mid_block.weight)
    x, states, picture = noise(2, 4, 8, 8), noise(2, 5, 2048, seed=1), noise(2, 3, 64, 64, seed=2)
    t = torch.tensor([20.0, 700.0])
    added = {"text_embeds": noise(2, 32, seed=3), "time_ids": 100 * noise(2, 6, seed=4)}
    wanted = theirs(x, t, states, picture, added_cond_kwargs=added, return_dict=False)
    for name in ("one", "prefixed", "bare", "theirs"):
        control = load_controlnet(tmp_path / f"{name}.safetensors")
        hint = Hint(control, control.embed(picture), torch.ones(2))
        told = control(x, t, states, None, added, hint)
        for ours, other in zip(told.skips, [*wanted[0], wanted[1]], strict=True):
            assert (ours - other).abs().max() <= 1e-6 * other.abs().max(), name
        assert control.module.config["cross_attention_dim"] == 2048


def test_one_without_attention_reads_no_text() -> None:
    """And so any width of text states fits it, which no shape of its file tells."""
    network = tiny_bundle().network
    plain = {"down_block_types": ["DownBlock2D"] * 2, "mid_block_type": "UNetMidBlock2D"}
    check_control(own(tiny_control(**plain, cross_attention_dim=2048)), network, 2)
    with pytest.raises(UserError, match="text states of width 2048"):
        check_control(own(tiny_control(cross_attention_dim=2048)), network, 2)


def test_names_of_xl_are_those_of_its_unet() -> None:
    """The way down of a ControlNet of Stable Diffusion XL, and what it has of its own."""
    with torch.device("meta"):
        unet = CrossAttentionUNet(UNET)
        kept = {key: value for key, value in unet.config.items() if key in ControlNet.choices}
        control = ControlNet(kept)
    nothing = torch.zeros((), dtype=torch.int8)
    shaped = {name: nothing.expand(v.shape) for name, v in unet.state_dict().items()}
    whole = part_tensors("unet", shaped, unet.config, "", None).keys()
    table = ldm.control_table(2, [False, True, True], 4)
    names = {ldm.renamed(name, table) for name in control.state_dict()}
    assert None not in names
    own = ("zero_convs.", "middle_block_out.", "input_hint_block.")
    down = {name for name in whole if not name.startswith(("output_blocks.", "out."))}
    assert {str(name) for name in names if not str(name).startswith(own)} == down
    assert len(names) - len(down) == 2 * (9 + 1 + 8)


def test_what_is_no_control_network_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such ControlNet"):
        load_controlnet(tmp_path / "none")
    tiny_unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="UNet2DConditionModel, and no ControlNetModel"):
        load_controlnet(tmp_path / "unet")
    save_file({"control_model.x": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="holds no ControlNet"):
        load_controlnet(tmp_path / "a.safetensors")
    save_file({"lora_controlnet": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="Control-LoRA"):
        load_controlnet(tmp_path / "b.safetensors")
    save_file(
        {"controlnet_cond_embedding.conv_in.weight": torch.ones(1)}, tmp_path / "b.safetensors"
    )
    with pytest.raises(UserError, match="layers of its U-Net"):
        load_controlnet(tmp_path / "b.safetensors")
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(UserError, match="pickle"):
        load_controlnet(tmp_path / "a.pth")
    tiny_control().save_pretrained(tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    config = json.loads(path.read_text())
    for key, value in {"class_embed_type": "timestep", "num_control_type": 6}.items():
        path.write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=rf"{key} {value} is for another kind"):
            load_controlnet(tmp_path / "c")
    path.write_text(json.dumps(config | {"conditioning_embedding_out_channels": [8, 8, 8]}))
    with pytest.raises(UserError, match="not in the weights"):
        load_controlnet(tmp_path / "c")
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(UserError, match="there already"):
        save_controlnet(load_controlnet_of(tmp_path, config), tmp_path / "mine.safetensors")


def load_controlnet_of(place: Path, config: dict[str, Any]) -> ControlNetwork:
    (place / "c" / "config.json").write_text(json.dumps(config))
    return load_controlnet(place / "c")


@torch.no_grad()
def test_a_fresh_one_is_a_copy_that_says_nothing() -> None:
    """As diffusers begins one; beside an inpainting U-Net it sees x alone."""
    theirs = tiny_unet(9)
    unet = CrossAttentionUNet(json.loads(theirs.to_json_string()))
    unet.load_state_dict(theirs.state_dict())
    fresh = ControlNet.beside(unet, [8, 8], 4)
    begun = ControlNetModel.from_unet(
        tiny_unet(), conditioning_embedding_out_channels=(8, 8)
    ).state_dict()
    plain = CrossAttentionUNet(json.loads(tiny_unet().to_json_string()))
    plain.load_state_dict(tiny_unet().state_dict())
    for name, value in ControlNet.beside(plain, [8, 8], 4).state_dict().items():
        if not name.startswith("controlnet_cond_embedding"):
            assert torch.equal(value, begun[name]), name
    picture = noise(1, 3, 16, 16).sigmoid()
    told = fresh(noise(1, 4, 8, 8), torch.ones(1), noise(1, 5, WIDTH), fresh.embed(picture))
    assert not any(value.any() for value in [*told[0], told[1]])
    assert torch.equal(fresh.conv_in.weight, unet.conv_in.weight[:, :4])

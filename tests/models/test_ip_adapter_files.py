"""Files of IP-Adapters: what is read, and what is refused in a line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_bundle, tiny_ip_adapter
from torch import Tensor

from latentdiff import UserError
from latentdiff.formats.ip_adapter import load_ip_adapter


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tiny_ip_adapter(tmp_path, tiny_bundle().network)


def changed(file: Path, values: dict[str, Tensor]) -> None:
    save_file({name: value.contiguous() for name, value in values.items()}, file)


def test_a_folder_with_one_adapter_a_pickle_or_several(file: Path) -> None:
    """A file, or the folder that holds no other one; values as they are stored."""
    stored = load_file(file)
    for where in (file, file.parent):
        read = load_ip_adapter(where)
        assert read.name == file.name
        state = read.module.state_dict()
        assert state.keys() == stored.keys()
        assert all(torch.equal(value, stored[name]) for name, value in state.items())
    half = load_ip_adapter(file, dtype=torch.bfloat16)
    assert (half.dtype, half.encoder.dtype) == (torch.bfloat16, torch.bfloat16)
    save_file(stored, file.with_name("ip-adapter-plus.safetensors"))
    with pytest.raises(UserError, match=r"name the file, one of ip-adapter-plus.safetensors, ip-"):
        load_ip_adapter(file.parent)
    pickled = file.with_name("ip-adapter_sd15.bin")
    pickled.write_bytes(b"")
    with pytest.raises(UserError, match="pickle"):
        load_ip_adapter(pickled)
    for one in file.parent.glob("*.safetensors"):
        one.unlink()
    with pytest.raises(UserError, match="pickle"):
        load_ip_adapter(file.parent)
    pickled.unlink()
    with pytest.raises(UserError, match="holds no IP-Adapter"):
        load_ip_adapter(file.parent)
    with pytest.raises(UserError, match="no such IP-Adapter"):
        load_ip_adapter(file)


FACE = {"image_proj.norm.weight": torch.ones(4), "image_proj.proj.0.weight": torch.ones(8, 4)}
DAMAGES: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "of something else": ({"model.x": torch.ones(1)}, r"model\.x is in the weights, but not in"),
    "FaceID": ({**FACE, "image_proj.proj.weight": None}, "FaceID adapter"),
    "FaceID plus": ({"image_proj.perceiver_resampler.x": torch.ones(1)}, "FaceID adapter"),
    "FaceID's LoRA": (
        {"ip_adapter.1.to_q_lora.down.weight": torch.ones(2, 2)},
        r"to_q_lora\.down\.weight is in the weights",
    ),
    "a layer short": (
        {"ip_adapter.3.to_k_ip.weight": None},
        r"3\.to_k_ip\.weight is not in the weights",
    ),
    "a layer of thousands of digits": (
        {f"ip_adapter.{'9' * 5000}.to_k_ip.weight": torch.ones(8, 16)},
        "is in the weights, but not in this network",
    ),
    "no projection": ({"image_proj.proj.weight": None}, "none of the published kinds"),
    "no norm": ({"image_proj.norm.weight": None}, "none of the published kinds"),
    "no matrix": ({"ip_adapter.1.to_k_ip.weight": torch.ones(4)}, "must be matrices"),
    "another shape": ({"image_proj.norm.bias": torch.ones(3)}, r"norm\.bias should be \[16\]"),
    "NaN": ({"image_proj.norm.bias": torch.full((16,), torch.nan)}, "NaN or infinity"),
    "whole numbers": ({"image_proj.norm.bias": torch.ones(16).long()}, "not floating point"),
    "odd latents": ({"image_proj.latents": torch.ones(3)}, "none of the published kinds"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_none_is_one_line(damage: str, file: Path) -> None:
    changes, told = DAMAGES[damage]
    values: dict[str, Any] = {**load_file(file), **changes}
    changed(file, {name: value for name, value in values.items() if value is not None})
    with pytest.raises(UserError, match=told) as raised:
        load_ip_adapter(file)
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)


def test_an_empty_file_and_one_of_another_model(file: Path) -> None:
    changed(file, {"unet.x": torch.ones(1)})
    with pytest.raises(UserError, match=r"holds no IP-Adapter \(image_proj"):
        load_ip_adapter(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="damaged or cut short"):
        load_ip_adapter(file)


def test_its_encoder_is_a_clip_that_sees_what_it_reads(file: Path, tmp_path: Path) -> None:
    """The folder beside it, or another; a whole CLIP has one, too."""
    path = file.parent / "image_encoder/config.json"
    config = json.loads(path.read_text())
    plus = tiny_ip_adapter(tmp_path / "plus", tiny_bundle().network, "plus")
    weights = file.parent / "image_encoder/model.safetensors"
    stored = load_file(weights)
    position = {"vision_model.embeddings.position_ids": torch.arange(10)[None]}
    text = {"text_model.x": torch.ones(1), "logit_scale": torch.ones(())}
    save_file({**stored, **position, **text}, weights)
    whole = {"model_type": "clip", "projection_dim": 10, "vision_config": config}
    path.write_text(json.dumps(whole))
    read = load_ip_adapter(file).encoder.state_dict()
    assert all(torch.equal(read[name], value) for name, value in stored.items())

    def refused(told: str, **changes: Any) -> None:
        path.write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=told):
            load_ip_adapter(file)

    refused(r"'siglip_vision_model' is no CLIP of pictures", model_type="siglip_vision_model")
    refused("image_size must be one number", image_size=[12, 12])
    refused("at most 2048 pixels a side", image_size=30_000)
    refused("num_channels must be 3", num_channels=4)
    refused("hidden_size is 'x'", hidden_size="x")
    refused("asks for 400 layers", num_hidden_layers=400)
    refused(r"tensor visual_projection\.weight should be", projection_dim=11)
    other = stored | {"visual_projection.weight": torch.ones(11, 16)}
    save_file(other, weights)
    refused("reads 10 numbers of an image encoder, and .* gives 11", projection_dim=11)
    assert load_ip_adapter(file, encoder=plus.parent / "image_encoder").device.type == "cpu"
    with pytest.raises(UserError, match="no such image encoder"):
        load_ip_adapter(file, encoder=tmp_path / "none")

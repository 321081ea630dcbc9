"""T2I-Adapters: their files, what is refused, and what they go with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_bundle, tiny_control, tiny_t2i_adapter, with_own_networks
from torch import Tensor

from latentdiff import Control, LatentDiffusionPipeline, RePaint, TiledDiffusion, UserError
from latentdiff.cli import main
from latentdiff.editing.tiled_diffusion import _part
from latentdiff.formats.t2i_adapter import load_t2i_adapter
from latentdiff.models.control import AdapterNetwork
from latentdiff.pictures import save_png


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_t2i_adapter().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_it_goes_with_a_control_network_edits_and_windows(folder: Path, tmp_path: Path) -> None:
    """Each is seen beside the other; known pixels stay; scale 0 is off; other precisions work."""
    bundle = with_own_networks(tiny_bundle())
    tiny_control().save_pretrained(tmp_path / "net")
    adapter, net = load_t2i_adapter(folder), Control(tmp_path / "net", picture(1))
    size = (15, 13)  # no multiples of the factor
    hole = Image.new("L", size, 0)
    hole.paste(255, (5, 4, 11, 9))
    fill = RePaint(picture(0, size), hole, jump_length=1, resamples=2)

    def drawn(*controls: Control, edits: Any = ()) -> Tensor:
        given: dict[str, Any] = {"num_inference_steps": 2, "seed": 5, "output_type": "pt"}
        pipe = LatentDiffusionPipeline(bundle)
        return pipe("a cat", controls=controls, edits=edits, progress=False, **given).images

    for edits in ([], ["pag:3"], [TiledDiffusion(window=(5, 6))]):
        found = [
            drawn(edits=edits),
            drawn(net, edits=edits),
            drawn(Control(adapter, picture(1)), edits=edits),
            drawn(Control(adapter, picture(2)), edits=edits),
            drawn(net, Control(adapter, picture(1)), edits=edits),
        ]
        for place, images in enumerate(found):
            for other in found[:place]:
                assert (images - other).abs().max() > 0.005
        assert torch.equal(drawn(Control(adapter, picture(1), 0), edits=edits), found[0])
    filled = drawn(Control(adapter, picture(1, size)), edits=[fill])
    known = torch.from_numpy(np.asarray(hole) == 0)
    given = torch.from_numpy(np.array(picture(0, size))).permute(2, 0, 1) / 255
    assert (filled[0] - given)[:, known].abs().max() < 1e-6
    assert (filled - drawn(edits=[fill])).abs().max() > 0.005
    half = adapter.on(torch.device("cpu"), torch.bfloat16)
    near = drawn(Control(half, picture(1)))
    assert half.dtype == torch.bfloat16
    assert 0 < (near - drawn(Control(adapter, picture(1)))).abs().max() < 0.1


def test_a_part_of_a_coarse_map_is_that_of_the_window() -> None:
    for side in (16, 17, 33):
        for k in range(4):
            own = -(-side // 2**k)
            whole = torch.arange(own * own).view(1, 1, own, own)
            for start, length in ((0, side), (3, 9), (side - 8, 8)):
                place = slice(start, start + length), slice(start, start + length)
                found = _part(whole, place, (side, side))
                assert found.shape[2:] == (-(-length // 2**k), -(-length // 2**k))
                assert int(found[0, 0, 0, 0]) == (start // 2**k) * (own + 1)


def test_what_is_none_is_one_line(folder: Path, tmp_path: Path) -> None:
    assert isinstance(Control(folder, picture(1)).loaded, AdapterNetwork)
    with pytest.raises(UserError, match="guess mode is for ControlNets"):
        Control(folder, picture(1), guess=True)
    tiny_control().save_pretrained(tmp_path / "net")
    with pytest.raises(UserError, match="describes ControlNetModel, and no T2IAdapter"):
        load_t2i_adapter(tmp_path / "net")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    damages: list[tuple[dict[str, Any], str]] = [
        ({"adapter_type": "mystery"}, "adapter_type mystery is none"),
        ({"in_channels": 4}, "in_channels must be 1 or 3"),
        ({"num_res_blocks": "2"}, "num_res_blocks is '2'"),
        ({"channels": [0, 32]}, r"channels is \[0, 32\]; it must be above 0"),
        ({"extra": 1}, "extra 1 is for another kind"),
        ({"channels": [32, 32, 32]}, "not in the weights"),
        ({"num_res_blocks": 500}, "asks for 1000 layers"),
    ]
    for changes, told in damages:
        path.write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=told):
            Control(folder, picture(1))
    path.write_text(json.dumps(config))
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        Control(folder, picture(1))
    wide = AdapterNetwork(tiny_t2i_adapter(channels=[32, 64]), "theirs")
    pipe = LatentDiffusionPipeline(tiny_bundle())
    with pytest.raises(UserError, match=r"theirs gives maps of .* belongs to another model"):
        pipe("a cat", controls=[Control(wide, picture(1))], progress=False)


def test_commands_take_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    tiny_bundle().save("model")
    save_png(picture(1), Path("photo.png"))
    base = ["--model", "model", "--seed", "3", "--steps", "2", "--solver", "ddim"]
    assert main(["generate", "a cat", "--control", "adapter:photo.png:0.8", *base]) == 0
    drawn = np.asarray(Image.open(capsys.readouterr().out.split()[-1]))
    pipe = LatentDiffusionPipeline.from_pretrained("model", engine="eager")
    call: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "solver": "ddim"}
    wanted = pipe("a cat", controls=[Control("adapter", "photo.png", 0.8)], progress=False, **call)
    assert np.array_equal(drawn, np.asarray(wanted.images[0]))

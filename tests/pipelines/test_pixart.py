"""A model of PixArt is as any other: files, edits, guidance, the command line, LoRAs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from test_house import python
from tiny import tiny_bundle, tiny_control, tiny_pixart
from torch import Tensor

from latentdiff import ILVR, PAG, Inpaint, LatentDiffusionPipeline, RePaint, SDEdit
from latentdiff.bundle import Bundle
from latentdiff.cli import main
from latentdiff.errors import UserError
from latentdiff.lora import (
    Layout,
    Lora,
    add_lora,
    attach_lora,
    detach_lora,
    fused,
    load_lora,
    lora_of,
    save_lora,
)
from latentdiff.models.control import ControlNetwork
from latentdiff.models.control_fit import check_control

BUNDLE = tiny_pixart(sizes=True)
NAMES = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "kohya": "kohya.safetensors",
    "peft": "adapter_model.safetensors",
}
STARTS = {
    "diffusers": "transformer.transformer_blocks.0.",
    "kohya": "lora_transformer_transformer_blocks_0_",
    "peft": "base_model.model.transformer_blocks.0.",
}


def picture(width: int = 16, height: int = 16) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def hole() -> Image.Image:
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    return mask


def draw(bundle: Bundle = BUNDLE, prompt: Any = "a red heart", **call: Any) -> Tensor:
    call = {"num_inference_steps": 3, "seed": 2, "output_type": "pt", "progress": False, **call}
    if not call.get("edits"):
        call = {"height": 16, "width": 16, **call}
    images = LatentDiffusionPipeline(bundle)(prompt, **call).images
    assert bool(torch.isfinite(images).all())
    return images


@pytest.mark.parametrize("kind", [{}, {"sizes": True}, {"sigma": True}, {"window": 9}], ids=str)
def test_a_folder_keeps_every_bit(kind: dict[str, Any], tmp_path: Path) -> None:
    """One with another window names no pipeline of diffusers, for none draws the same."""
    bundle = tiny_pixart(**kind)
    folder = bundle.save(tmp_path / "model")
    again = Bundle.load(folder)
    assert again.family == "pixart"
    assert again.conditioner.window == bundle.conditioner.window
    assert (again.steps, again.solver) == (bundle.steps, bundle.solver)
    again.save(tmp_path / "again")
    names = [*sorted(folder.rglob("*.safetensors")), folder / "model_index.json"]
    names += sorted(folder.glob("*/config.json"))
    for path in names:
        copied = tmp_path / "again" / path.relative_to(folder)
        assert path.read_bytes() == copied.read_bytes(), path
    index = json.loads((folder / "model_index.json").read_text())
    named = "PixArtSigmaPipeline" if "sigma" in kind else "PixArtAlphaPipeline"
    assert index["_class_name"] == ("LatentDiffusionPipeline" if "window" in kind else named)
    half = Bundle.load(folder, dtype="float16")  # in which T5 and the autoencoder would overflow
    dtypes = {name: next(m.parameters()).dtype for name, m in half.modules.items()}
    assert dtypes.pop("transformer") == torch.float16
    assert set(dtypes.values()) == {torch.float32}


FORMER: dict[str, Any] = {
    "_class_name": "Transformer2DModel",
    "double_self_attention": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
}


def changed(folder: Path, part: str, change: dict[str, Any]) -> None:
    path = folder / part
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (config | change).items() if v != "gone"}))


def test_a_folder_as_it_was_published_first(tmp_path: Path) -> None:
    """Its transformer is called by another class, and its scheduler is made of linear betas."""
    folder = BUNDLE.save(tmp_path / "model")
    wanted = draw()
    for name in ("interpolation_scale", "use_additional_conditions"):  # by 128 latents, the same
        changed(folder, "transformer/config.json", {name: "gone"})
    changed(folder, "transformer/config.json", FORMER)
    changed(folder, "model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]})
    bundle = Bundle.load(folder)
    module: Any = bundle.network.module
    assert module.config["interpolation_scale"] is None
    assert bundle.solver == "dpmpp-2m"
    theirs = Transformer2DModel.from_pretrained(folder / "transformer")  # which makes the other
    assert torch.equal(answer(theirs), answer(module))
    assert float((draw(bundle) - wanted).abs().max()) > 0.01  # places are twice as dense
    for scale in (1, 1.0):
        changed(folder, "transformer/config.json", {"interpolation_scale": scale})
        assert torch.equal(draw(Bundle.load(folder)), wanted)
    # As diffusers' script of conversion writes it for each Sigma of 256 pixels.
    changed(folder, "transformer/config.json", {"interpolation_scale": 0.5})
    theirs = Transformer2DModel.from_pretrained(folder / "transformer")
    assert torch.equal(answer(theirs), answer(Bundle.load(folder).network.module))
    assert float((draw(Bundle.load(folder)) - wanted).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("part", "change", "line"),
    [
        ("transformer/config.json", {"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        ("transformer/config.json", {"norm_type": "ada_norm_zero"}, "norm_type is 'ada_norm_zero'"),
        ("transformer/config.json", {"something_new": 1}, "something_new is 1"),
        ("transformer/config.json", {"attention_type": "gated"}, "attention_type is 'gated'"),
        ("transformer/config.json", {"patch_size": 0}, "patch_size is 0; it must be above 0"),
        ("transformer/config.json", {"sample_size": [8, 8]}, "sample_size is .8, 8.; it must be"),
        ("transformer/config.json", {"sample_size": 1}, "sample_size is smaller than its patch_si"),
        ("transformer/config.json", {"interpolation_scale": 0.0}, "_scale is 0.0; it must be ab"),
        ("transformer/config.json", {"interpolation_scale": -0.5}, "_scale is -0.5; it must be ab"),
        ("transformer/config.json", {"interpolation_scale": "1"}, "interpolation_scale is '1'; it"),
        ("transformer/config.json", {"attention_head_dim": 13}, "cannot be divided among"),
        ("transformer/config.json", {"cross_attention_dim": 16}, "is not the width of its text"),
        ("transformer/config.json", {"num_layers": 3}, "not in the weights"),
        ("transformer/config.json", {"num_layers": 10**6}, "asks for 1000000 layers"),
        ("transformer/config.json", {"_class_name": "SD3Transformer2DModel"}, "no transformer of"),
        ("transformer/config.json", {**FORMER, "norm_type": "gone"}, "norm_type is not ada_norm"),
        ("transformer/config.json", {"in_channels": 3}, "should be .24, 3, 2, 2."),
        ("model_index.json", {"prompt_window": 1}, "prompt_window is 1; it must be 2 .. 4096"),
        ("model_index.json", {"controlnet": ["diffusers", "x"]}, "it has a part controlnet"),
        ("model_index.json", {"transformer": ["diffusers", "FluxTransformer2DModel"]},
         "a PixArtAlphaPipeline with a transformer"),
        ("vae/config.json", {"latent_channels": 3}, "should be"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    part: str, change: dict[str, Any], line: str, tmp_path: Path
) -> None:
    folder = BUNDLE.save(tmp_path / "model")
    changed(folder, part, change)
    with pytest.raises(UserError, match=line) as caught:
        Bundle.load(folder)
    assert "\n" not in str(caught.value)


def test_single_files_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"t_block.1.weight": torch.zeros(2, 2)}, tmp_path / "PixArt.safetensors")
    with pytest.raises(UserError, match="the transformer of PixArt in the names of its training"):
        Bundle.load(tmp_path / "PixArt.safetensors")
    with pytest.raises(UserError, match="no single file holds a model of PixArt"):
        BUNDLE.save(tmp_path / "model.safetensors")


def test_drawing_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(BUNDLE.save(tmp_path / "model"))
    about = ["--model", model, "--steps", "2", "--out", str(tmp_path), "--size", "16"]
    sizes = ["--original-size", "512,384", "--target-size", "640,768"]
    pictures: list[bytes] = []
    for more in (["a Red heart", "--seed", "3", *sizes], ["a Red heart", "--seed", "3"]):
        assert main(["generate", *more, *about]) == 0
        drawn = Path(capsys.readouterr().out.strip())
        with Image.open(drawn) as image:
            pictures.append(image.tobytes())
        assert main(["generate", "--from", str(drawn), *about]) == 0
        with Image.open(Path(capsys.readouterr().out.strip())) as image:
            assert image.tobytes() == pictures[-1]
    assert pictures[0] != pictures[1]
    assert main(["info", model]) == 0
    told = capsys.readouterr().out
    for part in ("transformer   PixArtTransformer, ", "text_encoder  T5TextEncoder, "):
        assert part in told
    assert "window        120 tokens" in told


def test_neither_library_is_imported_to_draw(tmp_path: Path) -> None:
    model = BUNDLE.save(tmp_path / "model")
    line = ["generate", "a red heart", "--steps", "1", "--size", "16", "--model", str(model)]
    line += ["--out", str(tmp_path)]
    report = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = python("-c", f"from latentdiff.cli import main; main({line}); {report}")
    assert len(list(tmp_path.glob("*.png"))) == 1, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not {"diffusers", "transformers", "scipy", "peft"} & loaded


@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m", "ddpm"])
def test_edits_hold(solver: str) -> None:
    plain = draw(solver=solver)
    assert plain.std() > 0.05
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 255
    painted = draw(edits=[RePaint(picture(), hole(), resamples=2, jump_length=1)], solver=solver)
    assert (painted[..., 8:] - pixels[..., 8:]).abs().max() < 1e-6
    assert (painted[..., :8] - pixels[..., :8]).abs().max() > 0.05
    for edit in (SDEdit(picture(), 0.4), ILVR(picture(), 4)):
        assert (draw(edits=[edit], solver=solver) - plain).abs().max() > 0.05


@pytest.mark.parametrize(
    "call",
    [
        {"edits": ["pag:3"]},
        {"edits": ["seg:2"]},
        {"guidance": "apg"},
        {"also": ["a hat:0.7"]},
        {"negative_prompt": "a blue square"},
        {"prompt": "a (red:1.5) heart", "prompt_weights": True},
    ],
    ids=str,
)
def test_guidances_and_further_prompts_change_the_picture(call: dict[str, Any]) -> None:
    assert (draw(**{"height": 16, "width": 16, **call}) - draw()).abs().max() > 1e-3


def test_the_middle_of_a_transformer_is_its_middle_block() -> None:
    middle = draw(edits=["pag:3"], height=16, width=16)
    for layers, same in ((("transformer_blocks.1",), True), (("transformer_blocks.0",), False)):
        other = draw(edits=[PAG(3, layers=layers)], height=16, width=16)
        assert torch.equal(other, middle) == same


def test_pictures_of_any_size() -> None:
    """Latents that patches do not divide, in a batch as alone."""
    for width, height in ((16, 10), (22, 16), (4, 40)):
        edits = [SDEdit(picture(width, height), 0.6)]
        drawn = draw(prompt=["a red heart", "a sad dog"], edits=edits, seed=[3, 4])
        assert drawn.shape == (2, 3, height, width)
        alone = draw(prompt="a sad dog", edits=edits, seed=4)
        assert (alone - drawn[1:]).abs().max() < 1e-4


def test_what_a_transformer_does_not_take() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"edits": [Inpaint(picture(), hole())]}, "the transformer takes 4 channels, not 9"),
        ({"edits": [PAG(3, ("mid",))]}, "called 'mid'; there are: transformer_blocks.0.attn1, tr"),
        ({"long_prompts": True}, "only CLIP text encoders read prompts in chunks"),
        ({"clip_skip": 1}, "only a CLIP text encoder has layers to skip"),
    ]
    for call, line in cases:
        with pytest.raises(UserError, match=line):
            draw(**call)


def test_a_compiled_transformer_is_called_and_the_one_inside_saved() -> None:
    called: list[int] = []

    class Around(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

        def forward(self, *given: Any, **named: Any) -> Tensor:
            called.append(len(given))
            return self._orig_mod(*given, **named)

    network = BUNDLE.network.with_module(Around(BUNDLE.network.module))
    assert network.module is BUNDLE.network.module
    assert torch.equal(
        draw(replace(BUNDLE, network=network), guidance_scale=1.0), draw(guidance_scale=1.0)
    )
    assert len(called) == 3
    assert network.with_module(network.module).compiled is None  # pyright: ignore


def test_what_users_of_diffusers_look_at() -> None:
    pipe = LatentDiffusionPipeline(BUNDLE)
    assert pipe.transformer is BUNDLE.modules["transformer"]
    with pytest.raises(AttributeError, match="unet: parts are replaced in a model"):
        _ = pipe.unet


def made(seed: int = 0) -> Lora:
    """A LoRA as training would leave it: no factor is zero."""
    random, bundle = torch.Generator().manual_seed(seed), tiny_pixart(sizes=True)
    for parameter in add_lora(bundle, rank=3, alpha=2.0, targets="transformer"):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    return lora_of(bundle)


def answer(module: Any) -> Tensor:
    random = torch.Generator().manual_seed(7)
    x, states = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 5, 16, generator=random)
    sizes = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    given: dict[str, Any] = {"encoder_hidden_states": states, "added_cond_kwargs": sizes}
    with torch.no_grad():
        said = module(x, timestep=torch.tensor([3, 700]), **given)
    return getattr(said, "sample", said)


@pytest.mark.parametrize("layout", NAMES)
def test_a_lora_keeps_every_bit(layout: Layout, tmp_path: Path) -> None:
    lora, bundle = made(), tiny_pixart(sizes=True)
    path = save_lora(lora, tmp_path / NAMES[layout], layout=layout)
    assert any(name.startswith(STARTS[layout]) for name in load_file(path))
    again = load_lora(tmp_path if layout == "peft" else path, bundle)
    assert again.transformer.keys() == lora.transformer.keys()
    assert len(again.transformer) == 2 * 10 + 1  # four of each attention, two behind, proj_out
    for module, pair in lora.transformer.items():
        other = again.transformer[module]
        assert torch.equal(other.down, pair.down)
        assert torch.equal(other.up, pair.up)
        assert other.alpha == pair.alpha
    line = (
        "of a transformer, and this model has a U-Net|no such layer; the LoRA was made for another"
    )
    with pytest.raises(UserError, match=line):
        load_lora(path, tiny_bundle())


def test_peft_opens_what_is_saved_here_around_diffusers_transformer(tmp_path: Path) -> None:
    """And a model with it in its weights opens in diffusers; and it is taken out to the bit."""
    bundle = tiny_pixart(sizes=True)
    plain, wanted_picture = answer(bundle.network.module), draw(bundle)
    save_lora(made(), tmp_path / "lora" / NAMES["peft"], layout="peft")
    folder = bundle.save(tmp_path / "model")
    theirs = PixArtTransformer2DModel.from_pretrained(folder / "transformer")
    around = PeftModel.from_pretrained(theirs, str(tmp_path / "lora"))  # pyright: ignore
    attach_lora(bundle, load_lora(tmp_path / "lora", bundle), "a")
    got = answer(bundle.network.module)
    assert float((answer(around) - got).abs().max()) < 2e-5  # theirs is beside the weights
    assert float((got - plain).abs().max()) > 0.05
    whole = fused(bundle).save(tmp_path / "fused")
    theirs = PixArtTransformer2DModel.from_pretrained(whole / "transformer")
    assert float((answer(theirs) - got).abs().max()) < 1e-4
    detach_lora(bundle, "a")
    assert torch.equal(answer(bundle.network.module), plain)
    assert torch.equal(draw(bundle), wanted_picture)


def test_a_lora_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(BUNDLE.save(tmp_path / "model"))
    save_lora(made(), tmp_path / "a.safetensors")
    line = ["convert", str(tmp_path / "a.safetensors"), "--layout", "peft", "--model", model]
    assert main([*line, str(tmp_path / "b.safetensors")]) == 2
    assert "peft opens adapter_model.safetensors alone" in capsys.readouterr().err
    assert main([*line, str(tmp_path / "lora" / NAMES["peft"])]) == 0
    capsys.readouterr()
    pictures: set[bytes] = set()
    about = ["--model", model, "--steps", "2", "--out", str(tmp_path), "--size", "16"]
    for lora in ([], ["--lora", f"{tmp_path / 'a.safetensors'}"], ["--lora", f"{tmp_path}/lora"]):
        assert main(["generate", "a red heart", "--seed", "3", *about, *lora]) == 0
        with Image.open(Path(capsys.readouterr().out.strip())) as image:
            pictures.add(image.tobytes())
    assert len(pictures) == 2


def test_controls_stand_beside_u_nets() -> None:
    network = ControlNetwork(tiny_control())  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        UserError, match="control: controlnet stands beside a U-Net, and this model"
    ):
        check_control(network, BUNDLE.network, BUNDLE.factor)

"""Single-file checkpoints: held to diffusers' own reader, in both key layouts, and bit for bit."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import sd_like, tiny_bundle, tower_of, unet_of, vae_of
from torch import Tensor

from latentdiff import UserError
from latentdiff.bundle import Bundle

Saved = tuple[Bundle, Path, Path]


@pytest.fixture(scope="module", params=[1, 2], ids=["sd1", "sd2"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A model, its folder and its file."""
    place = tmp_path_factory.mktemp("single")
    bundle = sd_like(request.param)
    return bundle, bundle.save(place / "folder"), bundle.save(place / "one.safetensors")


def tensors(bundle: Any) -> dict[str, Tensor]:
    if isinstance(bundle, Bundle):
        parts: dict[str, Any] = {"unet": unet_of(bundle), "vae": vae_of(bundle)}
        parts["text"] = tower_of(bundle).model
    else:  # a pipeline of diffusers
        parts = {"unet": bundle.unet, "vae": bundle.vae, "text": bundle.text_encoder}
    return {f"{p}.{n}": v for p, network in parts.items() for n, v in network.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_diffusers_opens_the_file_with_every_bit(saved: Saved) -> None:
    bundle, folder, file = saved
    pipe = StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True
    )
    assert same(tensors(bundle), tensors(pipe))


def test_a_round_trip_keeps_every_bit(saved: Saved, tmp_path: Path) -> None:
    """File to folder to file: the same tensors, configs, tokenizer and schedule."""
    bundle, _, file = saved
    opened = Bundle.load(file)
    assert same(tensors(bundle), tensors(opened))
    again = Bundle.load(opened.save(tmp_path / "folder")).save(tmp_path / "two.safetensors")
    assert same(load_file(file), load_file(again))
    assert (opened.prediction, opened.steps) == (bundle.prediction, bundle.steps)
    assert unet_of(opened).config["sample_size"] == 64
    states = [
        tower_of(b).encode(["a red heart"]).states for b in (bundle, opened, Bundle.load(again))
    ]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_keys_are_those_of_the_field(saved: Saved) -> None:
    """Names that real checkpoints of either version have, and none of transformers 5."""
    bundle, _, file = saved
    names = set(load_file(file))
    config: Any = tower_of(bundle).model.config
    second = config.hidden_act == "gelu"
    for name in (
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.output_blocks.8.1.norm.weight",
        "model.diffusion_model.time_embed.2.bias",
        "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight",
        "first_stage_model.encoder.mid.attn_1.proj_out.bias",
        "cond_stage_model.model.transformer.resblocks.2.attn.in_proj_weight"
        if second
        else "cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc1.weight",
    ):
        assert name in names, name
    assert load_file(file)["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4


def test_a_file_of_others_opens_by_its_shapes(saved: Saved, tmp_path: Path) -> None:
    """No header, half precision, tensors nobody needs; the tokenizer in the folder beside it."""
    bundle, folder, file = saved
    foreign = foreign_file(file, tmp_path / "foreign.safetensors")
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    opened = Bundle.load(foreign)
    halves = {n: v.half().float() for n, v in tensors(bundle).items()}
    assert same(halves, tensors(opened))
    assert (opened.prediction, opened.steps.family) == ("eps", "ddim")
    for network, wanted in ((unet_of(opened), unet_of(bundle)), (vae_of(opened), vae_of(bundle))):
        for key in ("block_out_channels", "layers_per_block", "down_block_types"):
            assert list(_each(network.config[key])) == list(_each(wanted.config[key])), key
    random = torch.Generator().manual_seed(0)
    x, states = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 5, 64, generator=random)
    told = unet_of(opened)(x, 3, states)  # by the same number of heads
    bundle = Bundle.load(folder, dtype=torch.float16).save(tmp_path / "half")
    wanted = unet_of(Bundle.load(bundle, dtype="float32"))(x, 3, states)
    assert torch.equal(told, wanted)


def _each(value: object) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def foreign_file(file: Path, to: Path, **metadata: str) -> Path:
    values = {name: value.half() for name, value in load_file(file).items()}
    values["alphas_cumprod"] = torch.ones(1000)
    values["model_ema.num_updates"] = torch.tensor(7)
    if any("text_model" in name for name in values):
        prefix = "cond_stage_model.transformer.text_model."
        values[f"{prefix}embeddings.position_ids"] = torch.arange(12)[None]
    else:
        values["cond_stage_model.model.text_projection"] = torch.eye(64)
        values["cond_stage_model.model.logit_scale"] = torch.ones(())
    save_file(values, to, metadata or None)
    return to


def test_what_lies_beside_the_weights_is_left_out_by_name(saved: Saved, tmp_path: Path) -> None:
    """What an autoencoder's training leaves in its tensors, which A1111 drops; and strangers."""
    bundle, folder, file = saved
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    vae = "first_stage_model."
    values = load_file(file) | {
        f"{vae}model_ema.decay": torch.tensor(0.99),
        f"{vae}model_ema.num_updates": torch.tensor(3),
        f"{vae}loss.logvar": torch.tensor(0.0),
        "alphas_cumprod": torch.ones(1000),
        "stranger.weight": torch.ones(2),
    }
    save_file(values, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="left out") as told:
        opened = Bundle.load(tmp_path / "a.safetensors")
    assert same(tensors(bundle), tensors(opened))
    lines = [str(one.message) for one in told]
    assert len(lines) == 2
    assert any(f"{vae}loss.logvar and 2 more" in line for line in lines)
    assert any("stranger.weight." in line for line in lines)


def test_a_file_without_autoencoder_takes_another(saved: Saved, tmp_path: Path) -> None:
    """From a folder, a whole model, a file in either form; and the refusal says how."""
    bundle, folder, file = saved
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    values, vae = load_file(file), "first_stage_model."
    save_file(
        {n: v for n, v in values.items() if not n.startswith(vae)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(UserError, match=r"holds no autoencoder .*--vae"):
        Bundle.load(tmp_path / "a.safetensors")
    alone = {n.removeprefix(vae): v for n, v in values.items() if n.startswith(vae)}
    save_file(alone | {"model_ema.num_updates": torch.tensor(3)}, tmp_path / "vae.safetensors")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    for where in (folder, folder / "vae", file, tmp_path / "vae.safetensors", weights):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = Bundle.load(tmp_path / "a.safetensors", vae=where)
        assert same(tensors(bundle), tensors(opened))
    other = sd_like(1)
    vae_of(other).get_parameter("decoder.conv_out.bias").add_(1)
    opened = Bundle.load(folder, vae=other.save(tmp_path / "other"))
    assert torch.equal(
        vae_of(opened).get_parameter("decoder.conv_out.bias"),
        vae_of(other).get_parameter("decoder.conv_out.bias"),
    )
    for where, told in (
        ("none", "no such autoencoder"),
        ("a.safetensors", "holds no autoencoder"),
        ("x.ckpt", "pickle"),
        ("bare.safetensors", "needs its config.json"),
    ):
        (tmp_path / "x.ckpt").write_bytes(b"PK")
        save_file(load_file(weights), tmp_path / "bare.safetensors")
        with pytest.raises(UserError, match=told):
            Bundle.load(tmp_path / "a.safetensors", vae=tmp_path / where)


def test_an_autoencoder_brings_its_own_scale(saved: Saved, tmp_path: Path) -> None:
    """Of a whole model as a folder, as a file of ours, and as one with a .yaml beside it."""
    _, folder, file = saved
    other = sd_like(1)
    vae_of(other).register_to_config(scaling_factor=0.7)
    whole = other.save(tmp_path / "folder"), other.save(tmp_path / "whole.safetensors")
    foreign = foreign_file(whole[1], tmp_path / "foreign.safetensors")
    prefix, values = "first_stage_model.", load_file(foreign)
    alone = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
    save_file(alone, tmp_path / "alone.safetensors")
    for name in ("foreign", "alone"):
        where = tmp_path / f"{name}.safetensors"
        assert Bundle.load(folder, vae=where).autoencoder.scaling_factor == 0.18215
        where.with_suffix(".yaml").write_text("model: {params: {scale_factor: 0.7}}")
    for where in (*whole, whole[0] / "vae", foreign, tmp_path / "alone.safetensors"):
        for model in (folder, file):
            assert Bundle.load(model, vae=where).autoencoder.scaling_factor == 0.7, where


def test_a_file_without_text_encoder_is_one_line(saved: Saved, tmp_path: Path) -> None:
    values = {n: v for n, v in load_file(saved[2]).items() if not n.startswith("cond_stage")}
    save_file(values, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no text encoder"):
        Bundle.load(tmp_path / "a.safetensors")


def test_v_prediction_is_found_out(saved: Saved, tmp_path: Path) -> None:
    """By the header of ModelSpec; in version 2 also by the telltale that ComfyUI looks at."""
    _, folder, file = saved
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    told = {"modelspec.prediction_type": "v", "modelspec.resolution": "768x768"}
    opened = Bundle.load(foreign_file(file, tmp_path / "a.safetensors", **told))
    assert (opened.prediction, unet_of(opened).config["sample_size"]) == ("v", 96)


BESIDE = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 1e-3
    linear_end: 0.0120
    timesteps: 500
    parameterization: "v"
    scale_factor: 0.25
    image_size: 64
    unet_config:
      params: {num_heads: 4, use_spatial_transformer: true}
    cond_stage_config:
      params: {freeze: true, layer: LAYER}
"""


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 99))
LAUGHS += "model:\n  params: {parameterization: *a98}\n"
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 99)
)
"""Each line is twice the one before: as a list, and as a mapping that is merged with itself."""


def test_what_lies_beside_a_checkpoint_is_obeyed(saved: Saved, tmp_path: Path) -> None:
    """A1111's NAME.yaml; files of Stable Diffusion 1.x that predict v come with one."""
    bundle, folder, file = saved
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    foreign_file(file, tmp_path / "a.safetensors")
    config: Any = tower_of(bundle).model.config
    second = config.hidden_act == "gelu"
    text = BESIDE.replace("LAYER", "penultimate" if second else "last")
    (tmp_path / "a.yaml").write_text("\ufeff" + text)
    opened = Bundle.load(tmp_path / "a.safetensors")
    betas = torch.linspace(1e-3**0.5, 0.012**0.5, 500, dtype=torch.float64) ** 2
    alpha = float((1 - betas).cumprod(0)[250].sqrt())
    assert opened.prediction == "v"
    assert opened.process.level(250).alpha == pytest.approx(alpha, abs=1e-9)
    assert opened.autoencoder.scaling_factor == 0.25
    assert unet_of(opened).config["attention_head_dim"] == 4
    assert Bundle.load(tmp_path / "a.safetensors", prediction="eps").prediction == "eps"
    for old, new, told in (
        ('"v"', "edm", "parameterization: 'edm' does not work here"),
        ("1e-3", "[1]", "linear_start"),
        ("0.25", ".nan", "scale_factor"),
        (f"layer: {'penultimate' if second else 'last'}", "layer: hidden", "layer: 'hidden'"),
        ("linear_start", "given_betas", "given_betas"),
        (text, "a: " * 3000, "YAML"),
        (text, "[" * 3000, "YAML"),
        (text, "!!python/object/apply:os.system [echo]", "YAML"),
        (text, "- model", "mapping"),
        (text, "model: 3", "mapping"),
        (text, " " * 2**21, "larger than 65,536 bytes"),
        ("500", "500.5", "timesteps: '?500.5'? is no whole number"),
        ("num_heads: 4", "num_heads: 4.5", "num_heads: '?4.5'? is no whole number"),
        ("0.0120", f"{[0] * 5000}", r"linear_end: \[0, 0, 0, 0, 0, 0, \.\.\.\] is no"),
        (text, LAUGHS, "an alias .* is not read"),
        (text, MERGES, "an alias .* is not read"),
    ):
        (tmp_path / "a.yaml").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=told) as caught:
            Bundle.load(tmp_path / "a.safetensors")
        assert "a.yaml: " in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "a.yaml").write_text("model:\n  params:\n")
    assert Bundle.load(tmp_path / "a.safetensors").prediction == "eps"


def test_markers_among_the_tensors_are_obeyed(saved: Saved, tmp_path: Path) -> None:
    _, folder, file = saved
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    values = load_file(file)
    marked = tmp_path / "a.safetensors"
    save_file(
        values | {"v_pred": torch.tensor([])}, marked, {"modelspec.prediction_type": "epsilon"}
    )
    opened = Bundle.load(marked)
    assert (opened.prediction, opened.process.level(999).alpha > 0) == ("v", True)
    save_file(values | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, marked)
    opened = Bundle.load(marked)
    assert (opened.prediction, opened.process.level(999).alpha) == ("v", 0)
    assert opened.timetable(None, 5)[0].t == 999


def test_the_telltale_of_version_2(tmp_path: Path) -> None:
    """It is the norm of the last block but two of the four-level U-Net."""
    bundle = sd_like(2, levels=4)
    norm = "up_blocks.3.attentions.2.transformer_blocks.0.norm1"
    bias = unet_of(bundle).get_parameter(f"{norm}.bias")
    random = torch.Generator().manual_seed(0)
    folder = bundle.save(tmp_path / "folder")
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    for spread, wanted in ((0.02, "eps"), (0.2, "v")):
        bias.copy_(spread * torch.randn(bias.shape, generator=random))
        file = foreign_file(bundle.save(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
        assert Bundle.load(file).prediction == wanted


def test_the_bundled_model_fits_in_one_file(tmp_path: Path) -> None:
    """Levels, layers and channels are not those of Stable Diffusion; the table has them all."""
    bundle = Bundle.load("emoji128")
    opened = Bundle.load(bundle.save(tmp_path / "a.safetensors"))
    assert same(tensors(bundle), tensors(opened))
    assert (opened.prediction, opened.size) == (bundle.prediction, bundle.size)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("model.diffusion_model.label_emb.0.0.weight", torch.ones(2), "it is of unCLIP"),
        ("model.diffusion_model.extra.weight", torch.ones(2), "not in this network"),
        ("model.diffusion_model.out.2.weight", None, "no Stable Diffusion 1.x or 2.x"),
        ("model.diffusion_model.out.0.weight", None, "conv_norm_out.weight is not in the weights"),
        ("model.diffusion_model.out.0.weight", torch.ones(3), "should be"),
        ("model.diffusion_model.out.0.weight", torch.full((32,), torch.nan), "NaN"),
        ("first_stage_model.decoder.conv_in.weight", None, "first_stage_model.decoder.conv_in"),
        ("cond_stage_model.model.ln_final.weight", None, "final_layer_norm.weight is not"),
    ],
)
def test_damage_is_one_line(name: str, value: Tensor | None, told: str, tmp_path: Path) -> None:
    bundle = sd_like(2, levels=2, layers=1)
    folder = bundle.save(tmp_path / "folder")
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    values = load_file(bundle.save(tmp_path / "a.safetensors"))
    values.pop(name, None)
    if value is not None:
        values[name] = value
    save_file(values, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=told) as caught:
        Bundle.load(tmp_path / "b.safetensors")
    assert "b.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "told"),
    [("{", "header is damaged"), ("[]", "header is damaged"), ('{"unet": 1e300}', "damaged")],
)
def test_a_damaged_header_is_one_line(header: str, told: str, tmp_path: Path) -> None:
    values = load_file(sd_like(1, 2, 1).save(tmp_path / "a.safetensors"))
    save_file(values, tmp_path / "b.safetensors", {"latentdiff": header})
    with pytest.raises(UserError, match=told):
        Bundle.load(tmp_path / "b.safetensors")


def test_a_hostile_header_costs_nothing(tmp_path: Path) -> None:
    """Billions of layers or channels, paths as names of files."""
    file = sd_like(1, 2, 1).save(tmp_path / "a.safetensors")
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["latentdiff"])
    values = load_file(file)
    for part, key, value in (
        ("unet", "layers_per_block", 10**9),
        ("unet", "block_out_channels", [64, 2**20 * 32]),
        ("text_encoder", "num_hidden_layers", 10**6),
        ("vae", "latent_channels", -4),
        ("tokenizer", "../../x", "y"),
    ):
        hostile = json.loads(json.dumps(config))
        hostile[part][key] = value
        save_file(values, tmp_path / "b.safetensors", {"latentdiff": json.dumps(hostile)})
        if part == "tokenizer":
            Bundle.load(tmp_path / "b.safetensors")
            assert not list(tmp_path.parent.glob("x"))
        else:
            with pytest.raises(UserError):
                Bundle.load(tmp_path / "b.safetensors")


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    (tmp_path / "x.ckpt").write_bytes(b"PK")
    (tmp_path / "y.safetensors").write_bytes(b"no")
    for name, told in (
        ("lora.safetensors", "--lora"),
        ("x.ckpt", "pickle"),
        ("y.safetensors", "damaged"),
        ("z.safetensors", "no such model"),
    ):
        with pytest.raises(UserError, match=told):
            Bundle.load(tmp_path / name)
    with pytest.raises(UserError) as caught:
        Bundle.load(tmp_path / "y.safetensors")
    assert str(caught.value).count("y.safetensors") == 1


def test_models_that_no_single_file_can_hold(tmp_path: Path) -> None:
    for bundle in (tiny_bundle(tower="t5"), tiny_bundle(vae="vq")):
        with pytest.raises(UserError, match="single file"):
            bundle.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_tokenizer_opens_offline_with_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a folder beside it nor the hub's cache, which is empty here, is needed."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    values = load_file(sd_like(1, 2, 1).save(tmp_path / "a.safetensors"))
    save_file(values, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="tokens are not CLIP's; put the folder tokenizer/"):
        Bundle.load(tmp_path / "b.safetensors")
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    values[name] = torch.randn(49408, 64, generator=torch.Generator().manual_seed(0))
    save_file(values, tmp_path / "b.safetensors")
    tower = tower_of(Bundle.load(tmp_path / "b.safetensors"))
    ids = tower.tokenize(["a photo of a cat"]).ids[0].tolist()
    assert ids == [49406, 320, 1125, 539, 320, 2368] + [49407] * (tower.window - 6)

"""Model folders: what is saved comes back; what is damaged, hostile or unfit is one clear line."""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from huggingface_hub import DryRunFileInfo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import bundle_of, tiny_bundle, tiny_clip, tiny_unet, tower_of, unet_of, vae_of
from torch import Tensor

from latentdiff import LatentDiffusionPipeline
from latentdiff.bundle import Bundle, Steps
from latentdiff.errors import UserError
from latentdiff.formats.autoencoder_files import load_autoencoder
from latentdiff.formats.embeddings import read_words
from latentdiff.formats.location import size_line
from latentdiff.formats.weights import PICKLES, all_finite
from latentdiff.lora import add_lora, load_lora, lora_names
from latentdiff.models.attention import set_attention
from latentdiff.models.network import DiffusersUNet

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
X = torch.ones(1, 4, 8, 8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle().save(tmp_path_factory.mktemp("bundle") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def draw(bundle: Bundle, **given: Any) -> Tensor:
    pipe = LatentDiffusionPipeline(bundle)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "progress": False}
    return pipe(["a red heart", "a cat face"], seed=1, **arguments, **given).images


def refusal(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(UserError) as caught:
        Bundle.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert str(folder) in message
    return message


def change(path: Path, **changes: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("tower", ["clip", "t5"])
@pytest.mark.parametrize("vae", ["kl", "vq"])
def test_what_is_saved_comes_back(
    tower: Literal["clip", "t5"], vae: Literal["kl", "vq"], tmp_path: Path
) -> None:
    bundle = tiny_bundle(tower=tower, vae=vae, process="vp-cosine", steps=Steps("karras", 1))
    bundle = replace(bundle, solver="heun" if tower == "clip" else "gddim")
    random = torch.get_rng_state()
    again = Bundle.load(bundle.save(tmp_path / "model"))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(draw(again), draw(bundle))
    assert (again.prediction, again.steps.spacing) == ("v", "karras")
    assert again.solver == bundle.solver
    for ours, theirs in ((unet_of(bundle), unet_of(again)), (vae_of(bundle), vae_of(again))):
        assert dict(ours.config) == {**theirs.config, **dict(ours.config)}
    assert not [p for p in tmp_path.iterdir() if p.name != "model"]
    assert not any(p.requires_grad for p in unet_of(again).parameters())
    again.save(tmp_path / "model")  # replaces a model
    for part in (UNET, VAE, TEXT):
        one = load_file(tmp_path / "model" / part)
        assert all(bool(torch.isfinite(t).all()) for t in one.values())


def test_large_finite_weights_are_finite() -> None:
    """Also where their sum is not."""
    assert all_finite(torch.full((100,), 3e38))
    assert all_finite(torch.full((100,), 60_000.0, dtype=torch.float16))
    for wrong in (math.nan, math.inf, -math.inf):
        assert not all_finite(torch.tensor([1.0, wrong, -wrong]))


def test_half_precision_files(tmp_path: Path) -> None:
    bundle = tiny_bundle()
    folder = bundle.save(tmp_path / "model", dtype=torch.float16)
    assert {t.dtype for t in load_file(folder / UNET).values()} == {torch.float16}
    again = Bundle.load(folder)
    assert (again.network.dtype, again.device.type) == (torch.float32, "cpu")
    for name, value in unet_of(again).state_dict().items():
        assert torch.equal(value, unet_of(bundle).state_dict()[name].half().float())
    low = Bundle.load(folder, dtype="bfloat16")
    assert low.network.dtype == torch.bfloat16
    assert (draw(low) - draw(again)).abs().max() < 0.25


def test_shards_and_variants(folder: Path) -> None:
    whole = draw(Bundle.load(folder))
    path = folder / UNET
    values = list(load_file(path).items())
    names = [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    mapping: dict[str, str] = {}
    for name, part in zip(names, (values[:40], values[40:]), strict=True):
        save_file(dict(part), folder / "unet" / name)
        mapping |= {key: name for key, _ in part}
    path.unlink()
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    variant = folder / VAE
    variant.rename(variant.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (folder / TEXT).rename(folder / "text_encoder/model.fp16.safetensors")
    assert torch.equal(draw(Bundle.load(folder)), whole)

    (folder / "unet" / names[1]).unlink()
    assert names[1] in refusal(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd.safetensors"}}))
    assert "not the name of a safetensors file" in refusal(folder)


def test_any_one_variant_opens_and_of_several_one_is_named(folder: Path) -> None:
    whole = draw(Bundle.load(folder))
    for part in (UNET, VAE, TEXT):
        path = folder / part
        path.rename(path.with_suffix(".bf16.safetensors"))
    assert torch.equal(draw(Bundle.load(folder)), whole)
    unet = folder / UNET
    values = {n: 2 * v for n, v in load_file(unet.with_suffix(".bf16.safetensors")).items()}
    save_file(values, unet.with_suffix(".ema.safetensors"))
    with pytest.raises(UserError, match=r"several variants, bf16, ema: say which with variant="):
        Bundle.load(folder)
    assert torch.equal(draw(Bundle.load(folder, variant="bf16")), whole)
    doubled = Bundle.load(folder, variant="ema")  # the other parts have none of this name
    name = "conv_in.weight"
    assert torch.equal(unet_of(doubled).get_parameter(name), values[name])
    save_file({n: v / 2 for n, v in values.items()}, unet)
    assert torch.equal(draw(Bundle.load(folder)), whole)  # weights without a variant come first
    assert not torch.equal(draw(Bundle.load(folder, variant="ema")), whole)
    for variant, told in (("fp32", "no part of it"), ("../x", "no name of one")):
        with pytest.raises(UserError, match=told):
            Bundle.load(folder, variant=variant)


def test_what_lies_beside_and_before_is_said_or_corrected(folder: Path) -> None:
    """An autoencoder with its training's rests; the size in the first configs, as diffusers has it;
    keys that ask for more than is there."""
    values = load_file(folder / VAE)
    save_file(values | {"loss.logvar": torch.zeros(1)}, folder / VAE)
    with pytest.warns(UserWarning, match=r"left out, for no picture needs it: loss\.logvar"):
        assert Bundle.load(folder).size == (16, 16)
    save_file(values, folder / VAE)
    config = folder / "unet" / "config.json"
    change(config, _diffusers_version="0.6.0")
    assert Bundle.load(folder).network.native_size == (64, 64)
    change(config, quantization_config={"bits": 4})
    assert "quantization_config" in refusal(folder)
    unet: Any = tiny_unet()
    unet.register_to_config(class_embed_type="timestep")
    with pytest.raises(UserError, match="class_embed_type is timestep"):
        DiffusersUNet(unet, 4)


def test_what_older_libraries_wrote(folder: Path) -> None:
    """Stable Diffusion 1 as published: no tokenizer.json, position ids, a safety checker, and the
    VAE's attention by its old names."""
    whole = draw(Bundle.load(folder))
    older = {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }
    values = load_file(folder / VAE)
    for name in list(values):
        for today, before in older.items():
            if today in name:
                values[name.replace(today, before)] = values.pop(name)
    assert "decoder.mid_block.attentions.0.query.weight" in values
    save_file(values, folder / VAE)
    (folder / "tokenizer/tokenizer.json").unlink()
    values = load_file(folder / TEXT)
    assert all(name.startswith("text_model.") for name in values)
    values["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    values["text_projection.weight"] = torch.zeros(16, 16)
    save_file(values, folder / TEXT)
    change(folder / "model_index.json", safety_checker=["stable_diffusion", "SafetyChecker"])
    assert torch.equal(draw(Bundle.load(folder)), whole)


def test_the_latent_scale_shift_and_statistics() -> None:
    bundle = tiny_bundle()
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = vae_of(bundle).encode(pictures).latent_dist.mode()  # pyright: ignore
    vae_of(bundle).register_to_config(scaling_factor=0.3, shift_factor=-0.2)
    assert (bundle.autoencoder.encode(pictures) - (z + 0.2) * 0.3).abs().max() < 1e-6
    decoded = vae_of(bundle).decode(z).sample  # pyright: ignore
    assert (bundle.autoencoder.decode((z + 0.2) * 0.3) - decoded).abs().max() < 1e-5

    mean, std = torch.tensor([0.1, 0.2, -3.0, 0.0]), torch.tensor([1.0, 2.0, 0.5, 4.0])
    vae_of(bundle).register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    latents = (z - mean.view(1, 4, 1, 1)) / std.view(1, 4, 1, 1) * 0.3
    assert (bundle.autoencoder.encode(pictures) - latents).abs().max() < 1e-6
    assert (bundle.autoencoder.decode(latents) - decoded).abs().max() < 1e-5
    for wrong in ({"scaling_factor": 0}, {"latents_std": [1.0, 2.0]}, {"latents_mean": ["x"] * 4}):
        broken = tiny_bundle()
        vae_of(broken).register_to_config(**wrong)
        with pytest.raises(UserError, match="must be finite"):
            bundle_of(vae_of(broken), unet_of(broken), tower_of(broken), broken.process, "eps")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def spoil(path: Path, name: str, value: float) -> None:
    values = load_file(path)
    values[name].view(-1)[3] = value
    save_file(values, path)


def drop(path: Path, name: str) -> None:
    values = load_file(path)
    del values[name]
    save_file(values, path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json: no such file"),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "unet/config.json: no such file"),
    "no weights": (lambda f: (f / VAE).unlink(), "no such file"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json"),
    "cut weights": (lambda f: cut_short(f / UNET), "damaged or cut short"),
    "empty weights": (lambda f: (f / VAE).write_bytes(b""), "damaged or cut short"),
    "no safetensors": (lambda f: (f / TEXT).write_bytes(b"\x80\x02}q." * 99), "damaged"),
    "huge header": (lambda f: (f / TEXT).write_bytes(b"\xff" * 64), "damaged"),
    "cut config": (lambda f: cut_short(f / "unet/config.json"), "not valid JSON"),
    "config a list": (lambda f: (f / "vae/config.json").write_text("[1]"), "object is needed"),
    "deep config": (lambda f: (f / "vae/config.json").write_text("[" * 10**5), "not valid JSON"),
    **{
        f"a key without a name in {part}": (
            lambda f, part=part: change(f / part / "config.json", **{"": 1}),
            f"{part}/config.json: it has a key without a name",
        )
        for part in ("unet", "vae", "text_encoder")
    },
    "a nest in the scheduler": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text(
            '{"trained_betas": ' + "[" * 500 + "]" * 500 + "}"
        ),
        "scheduler_config.json: not valid JSON (it is nested too deep)",
    ),
    "binary config": (lambda f: (f / "vae/config.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
    "broken tokenizer": (
        lambda f: (f / "tokenizer/tokenizer.json").write_text('{"model": 3}'),
        "no usable tokenizer",
    ),
    "nan": (lambda f: spoil(f / UNET, "conv_in.weight", float("nan")), "NaN or infinity"),
    "inf": (lambda f: spoil(f / VAE, "decoder.conv_in.bias", float("inf")), "NaN or infinity"),
    "missing tensor": (lambda f: drop(f / UNET, "conv_in.weight"), "conv_in.weight is not in"),
    "missing tensor of the vae": (lambda f: drop(f / VAE, "quant_conv.bias"), "is not in the"),
    "no scale": (lambda f: change(f / "vae/config.json", scaling_factor=0), "must be finite"),
    "wrong class": (
        lambda f: change(f / "unet/config.json", _class_name="UNet3DConditionModel"),
        "only UNet2DConditionModel",
    ),
    "other text model": (
        lambda f: change(f / "text_encoder/config.json", model_type="llama"),
        "neither a CLIP text model nor a T5 encoder",
    ),
    "two text encoders": (
        lambda f: change(f / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
        "text_encoder_2",
    ),
    "wider": (
        lambda f: change(f / "unet/config.json", block_out_channels=[32, 64]),
        "(and 1 more) is not in the weights",
    ),
    "another width of text": (
        lambda f: change(f / "unet/config.json", cross_attention_dim=24),
        "should be",
    ),
    "more layers": (lambda f: change(f / "unet/config.json", layers_per_block=2), "not in the"),
    "fewer layers": (
        lambda f: change(f / "text_encoder/config.json", num_hidden_layers=1),
        "but not in this network",
    ),
    "nonsense": (lambda f: change(f / "unet/config.json", norm_num_groups=0), "above 0"),
    "heads": (lambda f: change(f / "unet/config.json", attention_head_dim=3), "3 heads do not"),
    "wrong type": (lambda f: change(f / "vae/config.json", block_out_channels="x"), "must be"),
    "unknown activation": (lambda f: change(f / "unet/config.json", act_fn="rm"), "no network"),
    "unknown text activation": (
        lambda f: change(f / "text_encoder/config.json", hidden_act="os.system"),
        "no network",
    ),
    "conditioned on classes": (
        lambda f: change(f / "unet/config.json", num_class_embeds=3),
        "class_embedding.weight",
    ),
    "no schedule": (
        lambda f: change(f / "scheduler/scheduler_config.json", beta_schedule="zigzag"),
        "beta_schedule",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_clear_line(damage: str, folder: Path) -> None:
    act, expected = DAMAGES[damage]
    act(folder)
    assert expected in refusal(folder)


@pytest.mark.parametrize(
    "damage",
    [
        *("no weights", "empty weights", "inf", "missing tensor of the vae", "config a list"),
        *("deep config", "binary config", "wrong type", "no scale"),
    ],
)
def test_an_autoencoder_alone_is_read_with_the_same_care(damage: str, folder: Path) -> None:
    whole, bundle = load_autoencoder(folder / "vae"), Bundle.load(folder)
    assert torch.equal(whole.decode(X), bundle.autoencoder.decode(X))
    act, expected = DAMAGES[damage]
    act(folder)
    with pytest.raises(UserError, match=expected) as caught:
        load_autoencoder(folder / "vae")
    assert "\n" not in str(caught.value)


GREEDY: dict[str, dict[str, object]] = {
    "unet/config.json": {"block_out_channels": [10**6, 10**6], "attention_head_dim": 10**6},
    "vae/config.json": {"layers_per_block": 10**6},
    "text_encoder/config.json": {"num_hidden_layers": 10**6},
    "scheduler/scheduler_config.json": {"num_train_timesteps": 10**12},
}
MORE_GREEDY: list[tuple[str, dict[str, object]]] = [
    *GREEDY.items(),
    ("unet/config.json", {"layers_per_block": 300, "transformer_layers_per_block": 300}),
    ("unet/config.json", {"transformer_layers_per_block": [10**6, 1]}),
    ("unet/config.json", {"cross_attention_dim": 10**9}),
    ("unet/config.json", {"sample_size": 10**300}),
    ("vae/config.json", {"up_block_types": ["UpDecoderBlock2D"] * 10**5}),
    ("vae/config.json", {"latent_channels": 10**6}),
    ("text_encoder/config.json", {"vocab_size": 10**6, "hidden_size": 10**6}),
    ("text_encoder/config.json", {"max_position_embeddings": 10**6}),
]


@pytest.mark.parametrize(("file", "changes"), MORE_GREEDY, ids=lambda value: str(value)[:40])
def test_a_greedy_config_costs_nothing(file: str, changes: dict[str, object], folder: Path) -> None:
    change(folder / file, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    refusal(folder)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
CONFIGS = [
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
]


@contextlib.contextmanager
def loads_or_is_refused(folder: Path) -> Iterator[None]:
    """A damaged folder ends in a model or in one line, never in another error."""
    yield
    try:
        Bundle.load(folder)
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError(f"not one line: {error}") from error


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(CONFIGS), st.data())
def test_any_config_loads_or_is_refused(folder: Path, file: str, data: st.DataObject) -> None:
    path = folder / file
    whole = path.read_text()
    key = data.draw(st.sampled_from(sorted(json.loads(whole))))
    with loads_or_is_refused(folder):
        change(path, **{key: data.draw(JSON)})
    path.write_text(whole)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 3000), st.integers(0, 255))
def test_any_byte_of_a_header_loads_or_is_refused(folder: Path, place: int, value: int) -> None:
    path = folder / TEXT
    whole = path.read_bytes()
    with loads_or_is_refused(folder):
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
    path.write_bytes(whole)


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    """A pickle that leaves a file where it is opened; there must be none in the end."""
    mark = tmp_path / "opened"
    path = tmp_path / "model.ckpt"
    path.write_bytes(f"cos\nopen\n(S'{mark}'\nI{os.O_CREAT}\ntR.".encode())
    yield path
    assert not mark.exists()


def test_pickles_are_refused_unopened(hostile: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"pickle .*refused; get the model's safetensors version"):
        Bundle.load(hostile)
    (folder / UNET).unlink()
    shutil.copy(hostile, folder / "unet/diffusion_pytorch_model.bin")
    assert "refused; get the model's safetensors version" in refusal(folder)


@pytest.mark.parametrize("where", ["nobody/nothing", Path("nobody/nothing")])
def test_an_autoencoder_of_the_hub_is_looked_for_there(where: str | Path, folder: Path) -> None:
    """Offline here, which is one line; what looks like a file is looked for on the disk."""
    told = r"^nobody/nothing: no such folder, and not to be had from the Hugging Face Hub \("
    with pytest.raises(UserError, match=told) as caught:
        Bundle.load(folder, vae=where)
    assert "\n" not in str(caught.value)
    for other in ("nobody/nothing.safetensors", "no/such/folder", "/nobody/nothing"):
        with pytest.raises(UserError, match="no such autoencoder"):
            Bundle.load(folder, vae=other)


def test_an_autoencoder_in_the_cache_of_the_hub_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub lays it out: a folder of each revision."""
    from huggingface_hub import constants

    for name, place in (("alone", "."), ("whole", "vae")):
        root = tmp_path / "hub" / f"models--owner--{name}"
        shutil.copytree(folder / "vae", root / "snapshots" / "0123" / place, dirs_exist_ok=True)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    plain = vae_of(Bundle.load(folder)).state_dict()
    for name in ("alone", "whole"):
        found = vae_of(Bundle.load(folder, vae=f"owner/{name}")).state_dict()
        assert all(torch.equal(found[key], value) for key, value in plain.items())


def test_a_large_download_is_told_in_gigabytes() -> None:
    files = [(4_000_000_000, True), (None, True), (500_000_000, True), (9_000_000_000, False)]
    plan = [DryRunFileInfo("0", size, "a", "/a", not load, load) for size, load in files]
    assert size_line(plan) == "4.5 GB in 3 files"
    assert size_line(plan[1:2]) is None


@pytest.mark.parametrize("suffix", sorted(PICKLES))
def test_every_door_refuses_a_pickle_by_its_name(suffix: str, folder: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle()
    for name in (f"a{suffix}", f"b{suffix.upper()}"):
        (tmp_path / name).write_bytes(b"PK")
        doors: list[Callable[[Path], object]] = [
            Bundle.load,
            lambda path: Bundle.load(folder, vae=path),
            lambda path: load_lora(path, bundle),
            lambda path: read_words(path, {"text_encoder": 16}),
        ]
        for door in doors:
            with pytest.raises(UserError, match=r"a pickle checkpoint can run any code"):
                door(tmp_path / name)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("no/such/folder", "no such model folder"),
        ("emoji64", "bundled no more; 'emoji128'"),
        ("nobody/nothing", "not to be had from the Hugging Face Hub"),
        ("missing.ckpt", "no such model file"),
        ("x" * 5000, "not a model"),
        ("\0", "no such model folder"),
        ("", "is empty"),
    ],
)
def test_no_such_model(where: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        Bundle.load(where)
    assert "\n" not in str(caught.value)


def test_bad_options_come_before_any_reading() -> None:
    for wrong in ({"dtype": "float8"}, {"device": "abacus"}, {"attention": "flash"}):
        arguments: dict[str, Any] = wrong
        with pytest.raises(UserError, match="|".join(wrong.values())):
            Bundle.load("no/such/folder", **arguments)


def test_a_network_compiled_by_hand_is_the_network(folder: Path) -> None:
    """It is called; saved, perturbed and given a LoRA is what is inside it. (Nothing compiles here:
    dynamo takes ten seconds.)"""
    bundle = Bundle.load(folder)
    unet: Any = torch.compile(unet_of(bundle))
    compiled = replace(bundle, network=bundle.network.with_module(unet))
    calls: list[int] = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(draw(compiled), draw(bundle))
        assert len(calls) == 2
        perturbed = [draw(b, edits=["pag:3"]) for b in (compiled, bundle)]
        assert torch.equal(*perturbed)
        assert not torch.equal(perturbed[0], draw(bundle))
        for name in ("again", "again.safetensors"):
            again = Bundle.load(compiled.save(folder.parent / name))
            assert torch.equal(draw(again), draw(bundle))
        add_lora(compiled)
        assert lora_names(compiled) == ["lora"]


def test_parts_must_fit() -> None:
    bundle, wide = tiny_bundle(), tiny_clip()
    wide.model.config.hidden_size = 24
    wide = type(wide)(wide.model, wide.tokenizer)  # pyright: ignore
    with pytest.raises(UserError, match="width 16, but the text encoder's have 24"):
        bundle_of(vae_of(bundle), unet_of(bundle), wide, bundle.process, "eps")
    for changes, expected in (
        ({"in_channels": 7}, "takes 7 and gives 4 channels, but the vae's latents have 4"),
        ({"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
        ({"sample_size": None}, "sample_size does not say"),
    ):
        bundle = tiny_bundle()
        unet_of(bundle).register_to_config(**changes)
        with pytest.raises(UserError, match=expected):
            bundle_of(vae_of(bundle), unet_of(bundle), tower_of(bundle), bundle.process, "eps")
    for changes in ({"latents_std": [2.0] * 4}, {"latents_mean": [0.0] * 4}, {"shift_factor": 0.1}):
        bundle = tiny_bundle(in_channels=8)
        vae_of(bundle).register_to_config(**changes)
        with pytest.raises(UserError, match="such a pair does not work"):
            bundle_of(vae_of(bundle), unet_of(bundle), tower_of(bundle), bundle.process, "eps")


def test_saving_replaces_a_model_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    for target in (precious, precious / "thesis.txt"):
        with pytest.raises(UserError, match="not a model folder"):
            tiny_bundle().save(target)
    assert [p.name for p in precious.iterdir()] == ["thesis.txt"]

    whole = draw(Bundle.load(folder))
    broken = tiny_bundle(seed=1)
    with torch.no_grad():
        # found after the U-Net is written
        next(tower_of(broken).model.parameters()).fill_(torch.inf)
    with pytest.raises(UserError, match="not finite"):
        broken.save(folder)
    assert torch.equal(draw(Bundle.load(folder)), whole)
    assert {p.name for p in tmp_path.iterdir()} == {"precious", "model"}
    tiny_bundle(seed=1).save(folder)
    assert not torch.equal(draw(Bundle.load(folder)), whole)


def test_attention_backends_agree() -> None:
    bundle = tiny_bundle()
    assert set_attention(unet_of(bundle), "eager") == "eager"
    eager = draw(bundle)
    assert set_attention(unet_of(bundle), "sdpa") == "sdpa"
    assert (draw(bundle) - eager).abs().max() < 1e-4
    assert set_attention(unet_of(bundle).bfloat16()) == "auto"
    kinds = {type(p).__name__ for p in unet_of(bundle).attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"}
    if find_spec("xformers") is None:
        with pytest.raises(UserError, match="not installed"):
            set_attention(unet_of(bundle), "xformers")


def test_bfloat16_is_chosen_where_it_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: for a large network, where there are instructions for it."""
    folder = tiny_bundle().save(tmp_path / "model")
    for amx, avx512, large, expected in (
        (True, False, True, torch.bfloat16),
        (False, True, True, torch.bfloat16),
        (False, False, True, torch.float32),
        (True, True, False, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=avx512: has)
        monkeypatch.setattr("latentdiff.bundle._LARGE", 1000 if large else 10**8)
        assert Bundle.load(folder, device="cpu").network.dtype == expected
    assert Bundle.load(folder, device="cpu", dtype="bfloat16").network.dtype == torch.bfloat16

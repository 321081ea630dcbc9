"""LoRA in a model, and LoRA files in both layouts, held to diffusers on a real tiny model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from tiny import sd_like, tiny_bundle, tower_of, unet_of
from torch import Tensor

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.bundle import Bundle
from latentdiff.lora import (
    Factors,
    Layout,
    Lora,
    add_lora,
    attach_lora,
    detach_lora,
    fused,
    is_lora,
    load_lora,
    lora_names,
    lora_of,
    lora_scales,
    save_lora,
    scale_loras,
)
from latentdiff.lora.factors import Part, layers, norms
from latentdiff.lora.file import ldm_names
from latentdiff.lora.layouts import SPELLINGS, Spelling, table


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle().save(tmp_path_factory.mktemp("model") / "tiny")


def made(targets: str | Sequence[str] = "all", *, rank: int = 3, seed: int = 0) -> Lora:
    """A LoRA of a tiny model as training would leave it: no factor is zero."""
    bundle = tiny_bundle()
    random = torch.Generator().manual_seed(seed)
    trained = add_lora(bundle, rank=rank, alpha=2.0, targets=targets, text_encoder=True)
    for parameter in trained:
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    return lora_of(bundle)


def answers(unet: Any, encoder: Any) -> tuple[Tensor, Tensor]:
    """Outputs of the two networks for fixed inputs."""
    random = torch.Generator().manual_seed(7)
    x = torch.randn(2, 4, 8, 8, generator=random)
    states = torch.randn(2, 12, 16, generator=random)
    ids = torch.randint(0, 500, (2, 12), generator=random)
    with torch.no_grad():
        noise = unet(x, torch.tensor([3.0, 700.0]), encoder_hidden_states=states)
        noise = getattr(noise, "sample", noise)  # diffusers puts it into an object
        return noise, encoder(input_ids=ids).last_hidden_state


def ours(bundle: Bundle) -> tuple[Tensor, Tensor]:
    return answers(unet_of(bundle), tower_of(bundle).model)


def theirs(pipe: StableDiffusionPipeline) -> tuple[Tensor, Tensor]:
    return answers(pipe.unet, pipe.text_encoder)


ROUNDING = 2e-5  # what W x + up (down x) and (W + up down) x may lie apart


def gap(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def diffusers_pipe(model: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(model)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_opens_what_is_saved_here(layout: Layout, model: Path, tmp_path: Path) -> None:
    """In their networks, at full strength and at 0.8. Theirs is beside weights, ours in them."""
    lora = made()
    save_lora(lora, tmp_path / "pytorch_lora_weights.safetensors", layout=layout)
    bundle = Bundle.load(model)
    plain = ours(bundle)
    pipe = diffusers_pipe(model)
    assert gap(plain, theirs(pipe)) == 0

    pipe.load_lora_weights(tmp_path, adapter_name="a")
    attach_lora(bundle, load_lora(tmp_path, bundle), "a")
    strong = ours(bundle)
    assert gap(strong, theirs(pipe)) < ROUNDING
    assert all(float((a - b).abs().max()) > 0.05 for a, b in zip(plain, strong, strict=True))

    pipe.set_adapters("a", 0.8)
    scale_loras(bundle, {"a": 0.8})
    assert gap(ours(bundle), theirs(pipe)) < ROUNDING
    assert gap(ours(bundle), strong) > 0.01


def test_several_at_once_as_diffusers_mixes_them(model: Path, tmp_path: Path) -> None:
    """LoRAs of different layers and ranks are mixed; then the first is taken out again."""
    first, second = made(), made("attention", rank=5, seed=1)
    thin = {
        module: Factors(pair.down[:2], pair.up[:, :2], 1.0) if "mid_block" in module else pair
        for module, pair in second.unet.items()
    }
    second = Lora(thin, {}, {})
    bundle, pipe = Bundle.load(model), diffusers_pipe(model)
    for name, lora, scale in (("a", first, 0.7), ("b", second, -1.5)):
        save_lora(lora, tmp_path / name / "pytorch_lora_weights.safetensors")
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        attach_lora(bundle, load_lora(tmp_path / name, bundle), name, scale)
    pipe.set_adapters(["a", "b"], [0.7, -1.5])
    assert lora_names(bundle) == ["a", "b"]
    both = ours(bundle)
    assert gap(both, theirs(pipe)) < ROUNDING

    detach_lora(bundle, "a")
    pipe.set_adapters(["b"], [-1.5])
    assert gap(ours(bundle)[:1], theirs(pipe)[:1]) < ROUNDING
    assert gap(ours(bundle)[:1], both[:1]) > 0.01


def test_files_of_diffusers_and_its_older_versions_open(model: Path, tmp_path: Path) -> None:
    """Files of `save_lora_weights`, with and without its metadata, and the keys of 2023."""
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = diffusers_pipe(model)
    random = torch.Generator().manual_seed(0)
    parts = {
        "unet": (pipe.unet, ["to_q", "to_out.0"]),
        "text_encoder": (pipe.text_encoder, ["q_proj", "out_proj"]),
    }
    layers: dict[str, Any] = {}
    for part, (network, targets) in parts.items():
        network.add_adapter(LoraConfig(r=4, lora_alpha=7, target_modules=targets))
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
        state = get_peft_model_state_dict(network)
        layers[part] = convert_state_dict_to_diffusers(state) if part == "text_encoder" else state
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "new",
        layers["unet"],
        layers["text_encoder"],
        **_collate_lora_metadata({part: network for part, (network, _) in parts.items()}),
    )
    bundle = Bundle.load(model)
    attach_lora(bundle, load_lora(tmp_path / "new", bundle), "new")
    assert gap(ours(bundle), theirs(pipe)) < ROUNDING

    values = load_file(tmp_path / "new" / "pytorch_lora_weights.safetensors")
    old = {_of_2023(name): value for name, value in values.items()}
    assert not old.keys() & values.keys()
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "pytorch_lora_weights.safetensors")
    detach_lora(bundle, "new")
    attach_lora(bundle, load_lora(tmp_path / "old", bundle), "old")
    pipe = diffusers_pipe(model)
    pipe.load_lora_weights(tmp_path / "old")
    assert gap(ours(bundle), theirs(pipe)) < ROUNDING


def _of_2023(name: str) -> str:
    part, _, rest = name.partition(".")
    for layer, text, alike in (("to_q", "q_proj", "to_q"), ("to_out.0", "out_proj", "to_out")):
        for half, ab in (("down", "A"), ("up", "B")):
            rest = rest.replace(f".{layer}.lora_{ab}", f".processor.{alike}_lora.{half}")
            rest = rest.replace(f".{text}.lora_linear_layer.{half}", f".{alike}_lora.{half}")
    return f"{part}.{rest}"


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_round_trip_keeps_every_bit(layout: Layout, tmp_path: Path) -> None:
    lora = made()
    file = save_lora(lora, tmp_path / "a.safetensors", layout=layout, metadata={"note": "hearts"})
    again = load_lora(file, tiny_bundle())
    assert again.metadata["note"] == "hearts"
    for part, pairs in lora.parts():
        read = dict(again.parts())[part]
        assert read.keys() == pairs.keys()
        for module, pair in pairs.items():
            assert torch.equal(read[module].down, pair.down)
            assert torch.equal(read[module].up, pair.up)
            assert read[module].alpha == pair.alpha == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_of_kohya_with_whole_alphas_and_flat_convolutions(tmp_path: Path) -> None:
    """Some tools write alpha as an integer, and 1 x 1 convolutions as matrices."""
    lora = made(["proj_in", "to_q"])
    save_lora(lora, tmp_path / "a.safetensors", layout="kohya")
    values = load_file(tmp_path / "a.safetensors")
    for name, value in values.items():
        if name.endswith("alpha"):
            values[name] = value.to(torch.int64)
        elif "proj_in" in name:
            values[name] = value[..., 0, 0]
    save_file(values, tmp_path / "b.safetensors")
    bundle, other = tiny_bundle(), tiny_bundle()
    attach_lora(bundle, lora, "a")
    attach_lora(other, load_lora(tmp_path / "b.safetensors", other), "b")
    assert gap(ours(bundle), ours(other)) == 0


def parts_of(bundle: Bundle) -> dict[Part, Any]:
    return {"unet": unet_of(bundle), "text_encoder": tower_of(bundle).model}


def told_of(spelling: Spelling, part: Part, model: Any) -> dict[str, str]:
    """The layers that a file in this layout changes here, and what it calls them."""
    if part == "text_encoder" and spelling.text is None:
        return {}
    named = {name: name for name in {**layers(model), **norms(model)}}
    told = ldm_names(model) if spelling.blocks == "ldm" and part == "unet" else named
    if spelling.name == "diffusers in 2023":
        return {
            name: other for name, other in told.items() if "attn" in name and "norm" not in name
        }
    shapes = {name: model.get_submodule(name).weight.shape for name in told}
    if "mid" in spelling.ends and part == "unet":
        return {name: other for name, other in told.items() if shapes[name][2:] == (3, 3)}
    return {n: other for n, other in told.items() if "diff" in spelling.ends or len(shapes[n]) > 1}


def drawn_change(spelling: Spelling, layer: Any, random: torch.Generator) -> tuple[Any, Any]:
    """The tensors of a layer by their kinds, and what they make of its parameters."""

    def drawn(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=random)

    outside, *inside = layer.weight.shape
    if "diff" in spelling.ends:
        made = {"diff": drawn(outside, *inside)}
        wanted = {"weight": layer.weight + made["diff"]}
        if layer.bias is not None:
            made["diff_b"] = drawn(outside)
            wanted["bias"] = layer.bias + made["diff_b"]
        return made, wanted
    made = {"up": drawn(outside, 3, *[1] * len(inside[1:])), "down": drawn(3, *inside)}
    product = torch.einsum("or,ri...->oi...", made["up"].flatten(1), made["down"])
    if "mid" in spelling.ends and len(inside) > 1:
        made |= {"down": drawn(3, inside[0], 1, 1), "mid": drawn(3, 3, *inside[1:])}
        outer = made["up"].flatten(1), made["mid"], made["down"].flatten(1)
        product = torch.einsum("or,rskl,si->oikl", *outer)
    if "alpha" in spelling.ends:
        made["alpha"], product = torch.tensor(1.5), 0.5 * product
    return made, {"weight": layer.weight + product}


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.name)
def test_every_layout_is_read(spelling: Spelling, tmp_path: Path) -> None:
    """Each equals W + alpha / rank * up @ down, or its own rule, to 1e-6, in both networks."""
    random = torch.Generator().manual_seed(5)
    bundle = Bundle.load(sd_like(1, levels=2, layers=1).save(tmp_path / "model"))
    clean = {
        p: {n: v.clone() for n, v in m.state_dict().items()} for p, m in parts_of(bundle).items()
    }
    expected = {part: dict(values) for part, values in clean.items()}
    values: dict[str, Tensor] = {}
    for part, model in parts_of(bundle).items():
        for module, told in told_of(spelling, part, model).items():
            made, wanted = drawn_change(spelling, model.get_submodule(module), random)
            values |= {spelling.spelled(part, told, kind): value for kind, value in made.items()}
            expected[part] |= {f"{module}.{end}": value for end, value in wanted.items()}
    save_file(
        {name: value.contiguous() for name, value in values.items()}, tmp_path / "a.safetensors"
    )
    attach_lora(bundle, load_lora(tmp_path / "a.safetensors", bundle), "a")
    for part, model in parts_of(fused(bundle)).items():
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[part][name], rtol=0, atol=1e-6)
        changed = sum(not torch.equal(expected[part][n], clean[part][n]) for n in clean[part])
        assert changed > (4 if part == "unet" or spelling.text else -1)
    detach_lora(bundle, "a")
    for part, model in parts_of(bundle).items():
        assert all(torch.equal(v, clean[part][name]) for name, v in model.state_dict().items())


def test_the_table_of_the_docs_is_made_of_the_list() -> None:
    assert len(SPELLINGS) >= 12
    assert table() in (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")


def test_sums_on_norms_and_biases(tmp_path: Path) -> None:
    """LyCORIS' own ends; scaled, mixed with another, saved and taken out bit for bit."""
    bundle, clean = tiny_bundle(), tiny_bundle()
    norm, conv = "down_blocks.0.resnets.0.norm1", "down_blocks.0.resnets.0.conv1"
    values = {
        "lora_unet_down_blocks_0_resnets_0_norm1.w_norm": torch.full((32,), 0.5),
        "lora_unet_down_blocks_0_resnets_0_norm1.b_norm": torch.full((32,), -0.25),
        "lora_unet_down_blocks_0_resnets_0_conv1.diff_b": torch.full((32,), 2.0),
    }
    save_file(values, tmp_path / "a.safetensors")
    lora = load_lora(tmp_path / "a.safetensors", bundle)
    attach_lora(bundle, made(), "other", 0.5)
    attach_lora(bundle, lora, "a", 0.8)
    attach_lora(bundle, lora, "b", -0.3)
    before = unet_of(clean).state_dict()
    for model in (unet_of(bundle), unet_of(fused(bundle))):
        layer = getattr(model.get_submodule(conv), "base_layer", model.get_submodule(conv))
        for got, name, change in (
            (model.get_submodule(norm).weight, f"{norm}.weight", 0.5),
            (model.get_submodule(norm).bias, f"{norm}.bias", -0.25),
            (layer.bias, f"{conv}.bias", 2.0),
        ):
            torch.testing.assert_close(got, before[name] + 0.5 * change, rtol=0, atol=1e-6)
    saved = save_lora(lora_of(bundle, "a"), tmp_path / "b.safetensors", layout="kohya")
    again = load_lora(saved, clean).sums["unet"]
    assert all(torch.equal(again[name], value) for name, value in lora.sums["unet"].items())
    assert again.keys() == lora.sums["unet"].keys()
    with pytest.raises(UserError, match="only the layout 'kohya'"):
        save_lora(lora, tmp_path / "c.safetensors")
    for name in ("other", "a"):
        detach_lora(bundle, name)
    assert lora_names(bundle) == ["b"]
    with pytest.raises(UserError, match="remove it, or fuse it"):
        bundle.save(tmp_path / "never")
    detach_lora(bundle, "b")
    assert gap(ours(bundle), ours(clean)) == 0
    bundle.save(tmp_path / "model")


def test_a_file_of_peft_has_its_settings_beside_it(tmp_path: Path) -> None:
    """What peft's own `save_pretrained` writes, without `unet.`, with alpha in a file beside it."""
    from peft import LoraConfig, get_peft_model

    bundle, theirs = tiny_bundle(), tiny_bundle()
    settings = LoraConfig(r=4, lora_alpha=7, target_modules=["to_q", "conv1"], use_rslora=True)
    model = get_peft_model(unet_of(theirs), settings)  # pyright: ignore[reportArgumentType]
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    model.save_pretrained(str(tmp_path))
    attach_lora(bundle, load_lora(tmp_path, bundle), "a")
    assert gap(ours(bundle), answers(model.base_model.model, tower_of(theirs).model)) < ROUNDING
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for key, value in (
        ("use_dora", True),
        ("init_lora_weights", "pissa"),
        ("peft_type", "OFT"),
        ("bias", "all"),
        ("modules_to_save", ["conv_in"]),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=key):
            load_lora(tmp_path, tiny_bundle())


def test_a_file_in_peft_layout_is_whole_without_its_config(tmp_path: Path) -> None:
    """As a kill between the two leaves it; and no other program's config is replaced."""
    bundle = tiny_bundle()
    add_lora(bundle, rank=2, alpha=8, targets=["to_q"])
    lora, path = lora_of(bundle), tmp_path / "adapter_model.safetensors"
    config = tmp_path / "adapter_config.json"
    for _ in range(2):  # it replaces its own
        save_lora(lora, path, layout="peft")
    saved = config.read_text()
    for there in (True, False):
        if not there:
            config.unlink()
        read = load_lora(path, tiny_bundle())
        assert {pair.alpha for pair in read.unet.values()} == {8.0}
    config.write_text(json.dumps(json.loads(saved) | {"lora_alpha": 4}))
    with pytest.raises(UserError, match=r"says another unet\.lora_alpha than adapter_config"):
        load_lora(path, tiny_bundle())
    path.unlink()
    for other in ('{"peft_type": "IA3"}', '{"architecture": "seq_bn"}', "no JSON"):
        config.write_text(other)
        with pytest.raises(UserError, match=r"adapter_config.json: it is there already and not"):
            save_lora(lora, path, layout="peft")
        assert (config.read_text(), path.exists()) == (other, False)


PATTERNS = ["to_q", "attn1.to_q", "^mid_block.resnets.0.conv1", r"attn1\.to_q", r"^down_blocks\.0"]
PATTERNS += [r"down_blocks.*", r"mid_block.*to_[qk]", r".*\.\d\.attn1\.to_q|conv1", "to_q$"]
PATTERNS += ["resnets.1.conv1", "o_q", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_alphas_of_peft_are_those_of_the_modules_that_it_takes(
    pattern: str, tmp_path: Path
) -> None:
    lora = made("all")
    header = {"unet.lora_alpha": 3, "unet.alpha_pattern": {pattern: 7, "conv2": 9}}
    config = {"lora_adapter_metadata": json.dumps(header)}
    save_lora(lora, tmp_path / "a.safetensors")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", config)
    found = load_lora(tmp_path / "b.safetensors", tiny_bundle()).unet
    for module, factors in found.items():
        key = get_pattern_key([pattern, "conv2"], module)
        assert factors.alpha == {pattern: 7, "conv2": 9}.get(key, 3), module
    assert pattern in ("o_q", r"^down_blocks\.0") or 7 in {f.alpha for f in found.values()}


def test_off_and_out_leave_the_model_as_it_was(model: Path, tmp_path: Path) -> None:
    bundle, clean = Bundle.load(model), Bundle.load(model)
    attach_lora(bundle, made(), "a")
    scale_loras(bundle, {"a": 0})
    assert gap(ours(bundle), ours(clean)) == 0
    with pytest.raises(UserError, match="remove it, or fuse it"):
        bundle.save(tmp_path / "never")
    detach_lora(bundle, "a")
    for one, other in (
        (unet_of(bundle), unet_of(clean)),
        (tower_of(bundle).model, tower_of(clean).model),
    ):
        mine, kept = one.state_dict(), other.state_dict()
        assert list(mine) == list(kept)
        assert all(torch.equal(mine[name], kept[name]) for name in kept)
    bundle.save(tmp_path / "again")


def test_fusing_adds_the_product_to_the_weights(model: Path, tmp_path: Path) -> None:
    """W + scale * alpha / rank * up @ down, with convolutions; the first model stays as it is."""
    bundle = Bundle.load(model)
    before = {name: value.clone() for name, value in unet_of(bundle).state_dict().items()}
    lora = made()
    attach_lora(bundle, lora, "a", 0.5)
    mixed = ours(bundle)
    fresh = fused(bundle)
    assert gap(ours(fresh), mixed) < 1e-4
    assert gap(ours(bundle), mixed) == 0
    for module, pair in lora.unet.items():
        product = torch.einsum("or,ri...->oi...", pair.up.flatten(1), pair.down)
        wanted = before[f"{module}.weight"] + 0.5 * 2.0 / 3 * product
        got = unet_of(fresh).get_submodule(module).weight
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    opened = diffusers_pipe(fresh.save(tmp_path / "fused"))
    assert gap(ours(fresh), theirs(opened)) == 0


def test_training_starts_from_the_model_and_trains_the_lora_alone() -> None:
    bundle, clean = tiny_bundle(), tiny_bundle()
    state = torch.random.get_rng_state()
    trained = add_lora(bundle, rank=2, text_encoder=True, dropout=0.1, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert gap(ours(bundle), ours(clean)) == 0
    needing = [
        p
        for n in (unet_of(bundle), tower_of(bundle).model)
        for p in n.parameters()
        if p.requires_grad
    ]
    assert {id(p) for p in needing} == {id(p) for p in trained}
    assert sum(p.numel() for p in trained) < 20_000
    same, other = tiny_bundle(), tiny_bundle()
    add_lora(same, rank=2, text_encoder=True, seed=4)
    add_lora(other, rank=2, text_encoder=True, seed=5)
    downs = [next(iter(lora_of(b).unet.values())).down for b in (bundle, same, other)]
    assert torch.equal(downs[0], downs[1])
    assert not torch.equal(downs[0], downs[2])

    optimizer = torch.optim.AdamW(trained, 0.1)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        states = tower_of(bundle).encode(["a red heart", "a cat"]).states
        unet_of(bundle)(x, 5, encoder_hidden_states=states).sample.square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    assert gap(ours(bundle), ours(clean)) > 0.001
    detach_lora(bundle, "lora")
    assert gap(ours(bundle), ours(clean)) == 0


def test_a_pipeline_takes_loras_in_and_out(model: Path, tmp_path: Path) -> None:
    file = save_lora(made(), tmp_path / "style v1.0.safetensors", layout="kohya")
    pipe = LatentDiffusionPipeline.from_pretrained(model)

    def draw(pipe: LatentDiffusionPipeline) -> Tensor:
        run = pipe("a cat", seed=0, num_inference_steps=2, output_type="latent", progress=False)
        return run.latents

    plain = draw(pipe)
    name = pipe.load_lora(file, scale=0.8)
    assert name == "style_v1_0"
    drawn = draw(pipe)
    assert float((drawn - plain).abs().max()) > 0.05
    merged = LatentDiffusionPipeline(pipe.fuse_loras())
    assert float((draw(merged) - drawn).abs().max()) < 1e-3
    pipe.set_loras({name: 0.0})
    assert torch.equal(draw(pipe), plain)
    pipe.set_loras({name: 0.8})
    assert torch.equal(draw(pipe), drawn)
    pipe.remove_lora(name)
    assert torch.equal(draw(pipe), plain)


Values = dict[str, Tensor]


def _other_width(values: Values) -> None:
    name = next(n for n in values if "to_q.lora_A" in n)
    values[name] = torch.zeros(3, 7)


def _other_rank(values: Values) -> None:
    name = next(n for n in values if "to_q.lora_A" in n)
    values[name] = torch.zeros(2, 32)


def _no_such_layer(values: Values) -> None:
    values["unet.down_blocks.9.to_q.lora_A.weight"] = torch.zeros(3, 32)
    values["unet.down_blocks.9.to_q.lora_B.weight"] = torch.zeros(32, 3)


def _large_alpha(values: Values) -> None:
    name = next(n for n in values if "to_q.lora_A" in n)
    values[name.replace(".lora_A.weight", ".alpha")] = torch.tensor(1e9)


def _both(values: Values) -> None:
    name = next(n for n in values if "to_q.lora_A" in n)
    values[name.replace(".lora_A.weight", ".diff")] = torch.zeros(32, 32)


def _other_shape(values: Values) -> None:
    values["unet.conv_in.diff"] = torch.zeros(3, 3)


def _two_names(values: Values) -> None:
    name = next(n for n in values if "to_q.lora_A" in n)
    values[name.removeprefix("unet.")] = values[name].clone()


def _no_bias(values: Values) -> None:
    name = next(n for n in values if "to_q.lora_A" in n)
    values[name.replace(".lora_A.weight", ".diff_b")] = torch.zeros(32)


def _infinite(values: Values) -> None:
    values[next(iter(values))].fill_(float("nan"))


def _scalar(values: Values) -> None:
    name = next(name for name in values if "lora_A" in name)
    values[name] = torch.tensor(1.0)


def _half(values: Values) -> None:
    del values[next(n for n in values if "lora_B" in n)]


def _other_half(values: Values) -> None:
    del values[next(n for n in values if "lora_A" in n)]


def _xl(values: Values) -> None:
    values["lora_te2_text_model_x.lora_down.weight"] = torch.zeros(3, 3)


def _lone_factor(values: Values) -> None:
    values["lora_unet_conv_in.hada_w1_a"] = torch.zeros(3, 3)


def _glora(values: Values) -> None:
    values["lora_unet_conv_in.a1.weight"] = torch.zeros(3, 3)


def _huge_core(values: Values) -> None:
    """A few kilobytes that make a kernel of 10^10 numbers."""
    values["lora_unet_conv_in.lora_mid.weight"] = torch.zeros(100_000, 1, 1, 1)
    values["lora_unet_conv_in.lora_down.weight"] = torch.zeros(1, 100_000, 1, 1)
    values["lora_unet_conv_in.lora_up.weight"] = torch.zeros(32, 1, 1, 1)


def _nothing(values: Values) -> None:
    values.clear()


def _whole_numbers(values: Values) -> None:
    name = next(iter(values))
    values[name] = values[name].to(torch.int32)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_other_width, "made for another model"),
        (_other_rank, "made for another model"),
        (_no_such_layer, "no such layer"),
        (_large_alpha, "alpha is too large"),
        (_both, "cannot have it"),
        (_other_shape, "made for another model"),
        (_two_names, "twice"),
        (_no_bias, "has no bias"),
        (_infinite, "NaN"),
        (_half, "other half"),
        (_scalar, "shape is not a LoRA's"),
        (_other_half, "other half"),
        (_xl, "Stable Diffusion XL"),
        (_lone_factor, "a factor is missing"),
        (_glora, r"\(IA\)\^3, GLoRA and OFT"),
        (_huge_core, "Tucker form"),
        (_nothing, "empty"),
        (_whole_numbers, "floating point"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_bad_file_is_one_line_and_changes_nothing(damage: Any, told: str, tmp_path: Path) -> None:
    save_lora(made("attention"), tmp_path / "a.safetensors")
    values = load_file(tmp_path / "a.safetensors")
    damage(values)
    save_file(values, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=told) as caught:
        load_lora(tmp_path / "b.safetensors", tiny_bundle())
    assert "\n" not in str(caught.value)
    assert "b.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("{", "not valid JSON"),
        ("[1]", "no JSON object"),
        ('{"unet.use_dora": true}', "use_dora"),
        ('{"unet.lora_alpha": "four"}', "not a number"),
        ('{"unet.lora_alpha": NaN}', "too large"),
        ('{"unet.lora_alpha": 1' + "0" * 400 + "}", "too large"),
        ('{"unet.alpha_pattern": [1]}', "alpha_pattern is no JSON object"),
        ('{"unet.alpha_pattern": {"(a+)+b": 1}}', "might take ages"),
        ('{"unet.alpha_pattern": {"' + ".*" * 30 + 'b": 1}}', "might take ages"),
        ('{"unet.alpha_pattern": {"a{9,99}b": 1}}', "might take ages"),
        ('{"unet.alpha_pattern": {"[a": 1}}', "is no expression"),
        (json.dumps({"unet.alpha_pattern": {f".*{n}": 1 for n in range(40)}}), "more than 32"),
    ],
)
def test_bad_metadata_is_one_line(config: str, told: str, tmp_path: Path) -> None:
    save_lora(made("attention"), tmp_path / "a.safetensors")
    values = load_file(tmp_path / "a.safetensors")
    save_file(values, tmp_path / "b.safetensors", {"lora_adapter_metadata": config})
    with pytest.raises(UserError, match=told):
        load_lora(tmp_path / "b.safetensors", tiny_bundle())


def test_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"PK")
    (tmp_path / "b.safetensors").write_bytes(b"no")
    save_file({"bundle_emb.cat.emb_params": torch.ones(2, 8)}, tmp_path / "d.safetensors")
    for name, told in (
        ("a.bin", "pickle"),
        ("b.safetensors", "damaged"),
        ("c", "no such LoRA"),
        ("d.safetensors", "learned words alone"),
    ):
        with pytest.raises(UserError, match=told):
            load_lora(tmp_path / name, tiny_bundle())
        assert not is_lora(tmp_path / name)


def test_refused_settings_leave_the_model_alone() -> None:
    bundle = tiny_bundle()
    names = set(unet_of(bundle).state_dict())
    unet_of(bundle).requires_grad_(True)
    for refused in (
        lambda: add_lora(bundle, name="bad name"),
        lambda: add_lora(bundle, rank=0),
        lambda: add_lora(bundle, alpha=float("nan")),
        lambda: add_lora(bundle, dropout=1.0),
        lambda: add_lora(bundle, targets=["to_z"]),
        lambda: attach_lora(bundle, made(), "a.b"),
        lambda: attach_lora(bundle, made(), "a", float("inf")),
        lambda: detach_lora(bundle, "a"),
        lambda: scale_loras(bundle, {"a": 1.0}),
        lambda: fused(bundle),
        lambda: lora_of(bundle),
    ):
        with pytest.raises(UserError):
            refused()
    assert set(unet_of(bundle).state_dict()) == names
    assert all(parameter.requires_grad for parameter in unet_of(bundle).parameters())
    attach_lora(bundle, made(), "a")
    for refused in (lambda: attach_lora(bundle, made(), "a"), lambda: add_lora(bundle)):
        with pytest.raises(UserError, match="already"):
            refused()


def test_of_layers_of_peft_nothing_is_left(model: Path, tmp_path: Path) -> None:
    """After the last one has gone the networks are as they were made, and can be saved."""
    bundle = Bundle.load(model)
    parts = {name: [type(layer) for layer in net.modules()] for name, net in bundle.modules.items()}
    for name in ("one", "two"):
        add_lora(bundle, rank=2, text_encoder=True, name=name)
        detach_lora(bundle, name)
    for name, network in bundle.modules.items():
        assert [type(layer) for layer in network.modules()] == parts[name]
    assert gap(ours(Bundle.load(bundle.save(tmp_path / "again"))), ours(Bundle.load(model))) == 0


def test_sums_in_weights_are_finite_unmoved_and_of_no_order(model: Path) -> None:
    """A scale under which they overflow is refused, at once and later; nothing is changed then."""
    bundle, other, lora = Bundle.load(model), Bundle.load(model), made()
    plain = ours(bundle)
    with pytest.raises(UserError, match="with its LoRA it is not finite"):
        attach_lora(bundle, lora, "a", 1e39)
    assert lora_names(bundle) == []
    assert gap(ours(bundle), plain) == 0
    attach_lora(bundle, lora, "a", 0.5)
    attach_lora(bundle, made("attention", rank=5, seed=1), "b", -0.7)
    attach_lora(other, made("attention", rank=5, seed=1), "b", -0.7)
    attach_lora(other, lora, "a", 0.5)
    assert gap(ours(bundle), ours(other)) == 0
    before = [p.data_ptr() for p in unet_of(bundle).parameters()]
    with pytest.raises(UserError, match="with its LoRA it is not finite"):
        scale_loras(bundle, {"b": 1e39})
    scale_loras(bundle, {"a": 0.5})
    assert [p.data_ptr() for p in unet_of(bundle).parameters()] == before
    assert lora_scales(bundle) == {"a": 0.5, "b": -0.7}
    assert gap(ours(bundle), ours(other)) == 0


def test_in_half_precision_small_changes_are_not_lost(model: Path) -> None:
    """There a LoRA stays beside the weights, which would round it away."""
    bundle = Bundle.load(model, dtype="bfloat16")
    weights = [p.clone() for p in unet_of(bundle).parameters()]
    attach_lora(bundle, made(), "a", 1e-4)
    assert {"lora_A", "lora_B"} <= {
        n.split(".")[-3] for n, _ in unet_of(bundle).named_parameters() if "lora_" in n
    }
    detach_lora(bundle, "a")
    assert all(map(torch.equal, weights, unet_of(bundle).parameters()))

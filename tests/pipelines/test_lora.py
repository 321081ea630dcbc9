"""LoRA in a model, and LoRA files in both layouts, held to diffusers on a real tiny model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import tiny_bundle, tower_of, unet_of
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
    load_lora,
    lora_names,
    lora_of,
    save_lora,
    scale_loras,
)


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


def gap(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def diffusers_pipe(model: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(model)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_opens_what_is_saved_here(layout: Layout, model: Path, tmp_path: Path) -> None:
    """In their networks, at full strength and at 0.8: equal to the last bit."""
    lora = made()
    save_lora(lora, tmp_path / "pytorch_lora_weights.safetensors", layout=layout)
    bundle = Bundle.load(model)
    plain = ours(bundle)
    pipe = diffusers_pipe(model)
    assert gap(plain, theirs(pipe)) == 0

    pipe.load_lora_weights(tmp_path, adapter_name="a")
    attach_lora(bundle, load_lora(tmp_path, bundle), "a")
    strong = ours(bundle)
    assert gap(strong, theirs(pipe)) == 0
    assert all(float((a - b).abs().max()) > 0.05 for a, b in zip(plain, strong, strict=True))

    pipe.set_adapters("a", 0.8)
    scale_loras(bundle, {"a": 0.8})
    assert gap(ours(bundle), theirs(pipe)) == 0
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
    assert gap(both, theirs(pipe)) == 0

    detach_lora(bundle, "a")
    pipe.set_adapters(["b"], [-1.5])
    assert gap(ours(bundle)[:1], theirs(pipe)[:1]) == 0
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
    assert gap(ours(bundle), theirs(pipe)) == 0

    values = load_file(tmp_path / "new" / "pytorch_lora_weights.safetensors")
    old = {_of_2023(name): value for name, value in values.items()}
    assert not old.keys() & values.keys()
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "pytorch_lora_weights.safetensors")
    detach_lora(bundle, "new")
    attach_lora(bundle, load_lora(tmp_path / "old", bundle), "old")
    pipe = diffusers_pipe(model)
    pipe.load_lora_weights(tmp_path / "old")
    assert gap(ours(bundle), theirs(pipe)) == 0


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


def _locon(values: Values) -> None:
    values["lora_unet_conv_in.hada_w1_a"] = torch.zeros(3, 3)


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
        (_infinite, "NaN"),
        (_half, "other half"),
        (_scalar, "shape is not a LoRA's"),
        (_other_half, "other half"),
        (_xl, "Stable Diffusion XL"),
        (_locon, "plain LoRA"),
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
    for name, told in (("a.bin", "pickle"), ("b.safetensors", "damaged"), ("c", "no such LoRA")):
        with pytest.raises(UserError, match=told):
            load_lora(tmp_path / name, tiny_bundle())


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

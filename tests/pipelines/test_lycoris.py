"""LoHa, LoKr and DoRA: the weight is what their formulas make of it, and comes back to the bit."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import tiny_bundle, unet_of, with_own_networks
from torch import Tensor

from latentdiff import UserError
from latentdiff.bundle import Bundle
from latentdiff.diffusion.condition import Condition
from latentdiff.lora import (
    add_lora,
    attach_lora,
    detach_lora,
    fused,
    is_lora,
    load_lora,
    lora_of,
    save_lora,
    scale_loras,
)
from latentdiff.models.engines import PackedNetwork

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # [32, 16]
CONV = "mid_block.resnets.0.conv1"  # [32, 32, 3, 3]
STEMS = {name: f"lora_unet_{name.replace('.', '_')}" for name in (LINEAR, CONV)}
SHAPES = {LINEAR: (32, 16), CONV: (32, 32, 3, 3)}
R = 3


def drawn(*shape: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def values_of(name: str, kind: str) -> dict[str, Tensor]:
    """The tensors of one layer, of shapes as LyCORIS makes them."""
    out, into, *kernel = SHAPES[name]
    k = math.prod(kernel)
    match kind:
        case "lora":
            down = drawn(R, into, *kernel)
            return {"lora_down.weight": down, "lora_up.weight": drawn(out, R, *[1] * len(kernel))}
        case "loha":
            return {
                "hada_w1_a": drawn(out, R),
                "hada_w1_b": drawn(R, into * k),
                "hada_w2_a": drawn(out, R) * 2,
                "hada_w2_b": drawn(R, into * k) * 2,
            }
        case "loha-tucker":
            return {
                "hada_t1": drawn(R, R, *kernel),
                "hada_w1_a": drawn(R, out),
                "hada_w1_b": drawn(R, into),
                "hada_t2": drawn(R, R, *kernel) * 2,
                "hada_w2_a": drawn(R, out) * 2,
                "hada_w2_b": drawn(R, into) * 2,
            }
        case "lokr":
            return {
                "lokr_w1": drawn(4, 8),
                "lokr_w2_a": drawn(out // 4, R),
                "lokr_w2_b": drawn(R, into // 8 * k),
            }
        case "lokr-both":
            return {
                "lokr_w1_a": drawn(4, R),
                "lokr_w1_b": drawn(R, 8),
                "lokr_w2": drawn(out // 4, into // 8, *kernel),
            }
        case "lokr-whole":
            return {"lokr_w1": drawn(4, 8), "lokr_w2": drawn(out // 4, into // 8, *kernel)}
    return {
        "lokr_w1": drawn(4, 8),
        "lokr_t2": drawn(R, R, *kernel),
        "lokr_w2_a": drawn(R, out // 4),
        "lokr_w2_b": drawn(R, into // 8),
    }


def change_by_hand(name: str, kind: str, v: dict[str, Tensor], alpha: float) -> Tensor:
    """Yeh et al. 2024 (LyCORIS), sec. 3, written out; the scale is alpha / rank."""
    shape = SHAPES[name]
    scale = alpha / R
    match kind:
        case "lora":
            product = v["lora_up.weight"].flatten(1) @ v["lora_down.weight"].flatten(1)
            return scale * product.reshape(shape)
        case "loha":
            halves = (v["hada_w1_a"] @ v["hada_w1_b"], v["hada_w2_a"] @ v["hada_w2_b"])
            return scale * (halves[0] * halves[1]).reshape(shape)
        case "loha-tucker":
            one, two = (
                torch.stack(
                    [
                        v[f"hada_w{n}_a"][i][:, None, None, None]
                        * v[f"hada_w{n}_b"][j][None, :, None, None]
                        * v[f"hada_t{n}"][i, j]
                        for i in range(R)
                        for j in range(R)
                    ]
                ).sum(0)
                for n in (1, 2)
            )
            return scale * one * two
        case "lokr-whole":
            scale = 1.0
    first = v["lokr_w1"] if "lokr_w1" in v else v["lokr_w1_a"] @ v["lokr_w1_b"]
    if "lokr_t2" in v:
        second = torch.einsum("ijkl,ip,jq->pqkl", v["lokr_t2"], v["lokr_w2_a"], v["lokr_w2_b"])
    else:
        second = v["lokr_w2"] if "lokr_w2" in v else v["lokr_w2_a"] @ v["lokr_w2_b"]
    second = second.reshape(shape[0] // 4, shape[1] // 8, *shape[2:])
    rows = [torch.cat([first[a, b] * second for b in range(8)], 1) for a in range(4)]
    return scale * torch.cat(rows)


def norms(weight: Tensor, axis: int) -> Tensor:
    """[out, 1, ...] for axis 0, [1, in, ...] for axis 1."""
    axes = [n for n in range(weight.ndim) if n != axis]
    return weight.square().sum(axes, keepdim=True).sqrt()


KINDS = ["lora", "loha", "loha-tucker", "lokr", "lokr-both", "lokr-whole", "lokr-tucker"]
CASES = [(CONV, kind) for kind in KINDS] + [(LINEAR, k) for k in KINDS if "tucker" not in k]


@pytest.mark.parametrize("axis", [None, 0, 1], ids=["plain", "outputs", "inputs"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_weight_is_what_the_formula_makes_of_it(
    name: str, kind: str, axis: int | None, tmp_path: Path
) -> None:
    """Also at other strengths, after a round trip of the file, fused, and taken out again."""
    bundle = tiny_bundle()
    layer = unet_of(bundle).get_submodule(name)
    before = layer.weight.clone()
    values, alpha = values_of(name, kind), 2.0
    change = change_by_hand(name, kind, values, alpha)
    if axis is not None:
        values["dora_scale"] = norms(before, axis) * (1 + drawn(*norms(before, axis).shape))
        turned = before + change
        change = values["dora_scale"] * turned / norms(turned, axis) - before
    elif kind == "lora":
        return  # plain ones are held to diffusers in test_lora.py
    values["alpha"] = torch.tensor(alpha)
    file = tmp_path / "a.safetensors"
    save_file({f"{STEMS[name]}.{end}": v.contiguous() for end, v in values.items()}, file)
    assert is_lora(file)
    attach_lora(bundle, load_lora(file, bundle), "a")
    assert change.abs().max() > 0.05
    assert (layer.weight - before - change).abs().max() < 1e-5
    again = save_lora(lora_of(bundle, "a"), tmp_path / "b.safetensors", layout="kohya")
    whole = unet_of(fused(bundle)).get_submodule(name).weight
    assert torch.equal(whole, layer.weight)
    scale_loras(bundle, {"a": -0.5})
    assert (layer.weight - before + 0.5 * change).abs().max() < 1e-5
    detach_lora(bundle, "a")
    assert torch.equal(layer.weight, before)
    attach_lora(bundle, load_lora(again, bundle), "a")
    assert torch.equal(layer.weight, whole)


def outputs(bundle: Bundle, network: Any = None) -> Tensor:
    random = torch.Generator().manual_seed(7)
    x, states = (torch.randn(shape, generator=random) for shape in ((2, 4, 8, 8), (2, 12, 16)))
    with torch.no_grad():
        network = bundle.network if network is None else network
        return network(x, torch.tensor([3.0, 700.0]), Condition(states=states), ())


def trained(kind: Any, targets: str = "all") -> Bundle:
    """A model with a LoRA of a kind in it, after some steps of training."""
    bundle = tiny_bundle()
    before = outputs(bundle)
    parameters = add_lora(bundle, rank=2, alpha=3.0, targets=targets, kind=kind)
    assert len(set(map(id, parameters))) == len(parameters)
    assert (outputs(bundle) - before).abs().max() < 1e-5, "a fresh one changes nothing"
    optimizer = torch.optim.Adam(parameters, 0.05)
    for _ in range(3):
        loss = (bundle.network(*_batch(), ()) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (outputs(bundle) - before).abs().max() > 1e-2
    return bundle


def _batch() -> tuple[Tensor, Tensor, Condition]:
    return drawn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), Condition(states=drawn(2, 12, 16))


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_what_was_trained_by_peft_is_saved_and_draws_the_same(kind: Any, tmp_path: Path) -> None:
    bundle = trained(kind)
    learned = outputs(bundle)
    file = save_lora(lora_of(bundle), tmp_path / "a.safetensors", layout="kohya")
    fresh = tiny_bundle()
    attach_lora(fresh, load_lora(file, fresh), "a")
    assert (outputs(fresh) - learned).abs().max() < 1e-4
    assert (outputs(fused(bundle)) - learned).abs().max() < 1e-4


def test_a_dora_goes_to_diffusers_and_comes_back(tmp_path: Path) -> None:
    bundle = trained("dora")
    learned = outputs(bundle)
    save_lora(lora_of(bundle), tmp_path / "pytorch_lora_weights.safetensors")
    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_bundle().save(tmp_path / "model"))
    pipe.load_lora_weights(tmp_path)
    x, t, condition = _batch()
    ours, theirs = (
        bundle.network(x, t, condition, ()),
        pipe.unet(x, t, encoder_hidden_states=condition.states).sample,
    )
    assert (ours - theirs).abs().max() < 1e-4
    fresh = tiny_bundle()
    attach_lora(fresh, load_lora(tmp_path, fresh), "a")
    assert (outputs(fresh) - learned).abs().max() < 1e-4
    with pytest.raises(UserError, match="which only the layout 'kohya'"):
        save_lora(lora_of(trained("loha", "attention")), tmp_path / "b.safetensors")


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "dora"])
def test_files_of_peft_open(kind: str, tmp_path: Path) -> None:
    import peft

    bundle, theirs = tiny_bundle(), tiny_bundle()
    names = ["to_q", "conv1"]
    if kind == "dora":
        config: Any = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, use_dora=True)
    else:
        config = getattr(peft, kind)(r=3, alpha=5, target_modules=names)
    model: Any = peft.get_peft_model(unet_of(theirs), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + drawn(*parameter.shape)
    model.save_pretrained(str(tmp_path))
    attach_lora(bundle, load_lora(tmp_path, bundle), "a")
    x, t, condition = _batch()
    wanted = model(x, t, encoder_hidden_states=condition.states).sample
    got = bundle.network(x, t, condition, ())
    assert (got - wanted).abs().max() < 1e-4
    assert (got - tiny_bundle().network(x, t, condition, ())).abs().max() > 0.05


def test_the_packed_engine_follows(tmp_path: Path) -> None:
    bundle = with_own_networks(tiny_bundle())
    packed = PackedNetwork.of(bundle.network)
    before = outputs(bundle, packed)
    values = {f"{STEMS[CONV]}.{end}": v for end, v in values_of(CONV, "lokr").items()}
    save_file(values, tmp_path / "a.safetensors")
    attach_lora(bundle, load_lora(tmp_path / "a.safetensors", bundle), "a", 0.7)
    assert (outputs(bundle, packed) - outputs(bundle)).abs().max() < 1e-4
    assert (outputs(bundle, packed) - before).abs().max() > 1e-2
    detach_lora(bundle, "a")
    assert torch.equal(outputs(bundle, packed), before)


def _without(end: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda values: values.__delitem__(end)


def _with(end: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda values: values.__setitem__(end, torch.zeros(shape))


@pytest.mark.parametrize(
    ("kind", "damage", "told"),
    [
        ("loha", _without("hada_w1_a"), "a factor is missing"),
        ("loha", _with("hada_w1_b", 100_000, 1), "a factor is missing"),
        ("loha", _with("hada_w2_a", 100_000, R), "made for another model"),
        ("loha", _with("hada_t1", R, R, 3, 3), "a factor is missing"),
        ("loha", _with("lokr_w1", 4, 8), "cannot have it"),
        ("loha", _with("lora_up.weight", 32, 3), "cannot have it"),
        ("loha-tucker", _with("hada_t1", R, R, 5, 5), "does not fit"),
        ("lokr", _with("lokr_w1", 100_000, 1), "does not make"),
        ("lokr", _with("lokr_w2", 8, 4, 3, 3), "do not make a LoKr"),
        ("lokr", _without("lokr_w2_b"), "do not make a LoKr"),
        ("lokr-whole", _with("lokr_w1", 0, 8), "do not make a LoKr"),
        ("lokr-tucker", _with("lokr_w2_a", 0, 8), "factor|core"),
        ("lokr", _with("dora_scale", 7, 1, 1, 1), "not the norms"),
        ("lora", _without("lora_up.weight"), "other half"),
    ],
)
def test_hostile_shapes_are_one_line(kind: str, damage: Any, told: str, tmp_path: Path) -> None:
    values = values_of(CONV, kind)
    damage(values)
    save_file({f"{STEMS[CONV]}.{end}": v for end, v in values.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=told) as caught:
        load_lora(tmp_path / "a.safetensors", tiny_bundle())
    assert "\n" not in str(caught.value)


def test_norms_alone_and_a_product_beyond_numbers_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({f"{STEMS[CONV]}.dora_scale": torch.ones(32, 1, 1, 1)}, file)
    with pytest.raises(UserError, match="without a change"):
        load_lora(file, tiny_bundle())
    values = {f"{STEMS[CONV]}.{end}": v * 1e30 for end, v in values_of(CONV, "loha").items()}
    save_file(values, file)
    bundle = tiny_bundle()
    before = {name: value.clone() for name, value in unet_of(bundle).state_dict().items()}
    with pytest.raises(UserError, match="not finite"):
        attach_lora(bundle, load_lora(file, bundle), "a")
    after = unet_of(bundle).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_lycoris_itself_opens_what_is_saved(tmp_path: Path) -> None:
    """Where the library is installed: its own product of the saved tensors is the change."""
    functional = pytest.importorskip("lycoris.functional")
    bundle = tiny_bundle()
    save_file(
        {f"{STEMS[LINEAR]}.{end}": v for end, v in values_of(LINEAR, "loha").items()},
        tmp_path / "a.safetensors",
    )
    layer = unet_of(bundle).get_submodule(LINEAR)
    before = layer.weight.clone()
    attach_lora(bundle, load_lora(tmp_path / "a.safetensors", bundle), "a")
    file = save_lora(lora_of(bundle, "a"), tmp_path / "b.safetensors", layout="kohya")
    v = {name.rpartition(".")[2]: value for name, value in load_file(file).items()}
    names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")
    change = functional.loha.diff_weight(
        *(v[name] for name in names), None, None, gamma=v["alpha"] / R
    )
    assert (layer.weight - before - change.reshape(before.shape)).abs().max() < 1e-5

"""The packed engine: it follows the weights, is checked, shared by threads, and leaves nothing."""

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CAPTIONS, tiny_bundle, with_own_networks
from torch import Tensor, nn

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.bundle import Bundle
from latentdiff.diffusion.condition import Condition
from latentdiff.lora import add_lora, attach_lora, detach_lora, lora_of, scale_loras
from latentdiff.models.attention import explicit, set_attention
from latentdiff.models.blocks import Upsample
from latentdiff.models.engines import PackedAutoencoder, PackedNetwork, with_engine
from latentdiff.models.engines.packed_layers import (
    PackedConv,
    PackedLinear,
    PackedUpsample,
    Pointwise,
)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs(bundle: Bundle, count: int = 2) -> tuple[Tensor, Tensor, Condition]:
    random = torch.Generator().manual_seed(count)
    condition = bundle.conditioner.encode(CAPTIONS[:count], (16, 16)).condition
    x = torch.randn(count, 4, 8, 8, generator=random)
    return x, torch.full((count,), 321.0), condition


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def test_it_is_the_default_of_a_pipeline_and_computes_packed(tmp_path: Path) -> None:
    folder = tiny_bundle().save(tmp_path / "model")
    bundle = LatentDiffusionPipeline.from_pretrained(folder).bundle
    network, autoencoder = bundle.network, bundle.autoencoder
    assert isinstance(network, PackedNetwork)
    assert isinstance(autoencoder, PackedAutoencoder)
    assert close(network(*inputs(bundle)), network.inner(*inputs(bundle)))
    kinds = {type(layer).__name__ for layer in network.packing.twin().modules()}
    assert "PackedConv" in kinds
    assert "Conv2d" not in kinds
    assert type(Bundle.load(folder).network) is type(network.inner)
    assert isinstance(Bundle.load(folder, device="cpu").inside("auto").network, PackedNetwork)
    with pytest.raises(UserError, match="in an engine already"):
        bundle.inside("packed")


def test_the_autoencoder_is_the_same() -> None:
    bundle = with_own_networks(tiny_bundle())
    packed = with_engine(bundle.network, bundle.autoencoder, "packed")[1]
    random = torch.Generator().manual_seed(0)
    for size in (16, 40):
        pictures = torch.rand(3, 3, size, size, generator=random) * 2 - 1
        latents = bundle.autoencoder.encode(pictures)
        assert close(packed.encode(pictures), latents)
        assert close(packed.decode(latents), bundle.autoencoder.decode(latents))
        assert close(packed.moments(pictures), bundle.autoencoder.moments(pictures))


def test_packed_layers_are_the_layers() -> None:
    """Each alone, also those that only bfloat16 takes, for one row, few and many, in any layout."""
    random = torch.Generator().manual_seed(0)
    linear = nn.Linear(24, 40)
    for shape in ((1, 24), (2, 5, 24), (3, 600, 24)):
        x = torch.randn(shape, generator=random)
        assert close(PackedLinear(linear)(x), linear(x))
    columns = torch.randn(24, 7, generator=random).T
    assert close(PackedLinear(linear)(columns), linear(columns))
    for kernel, stride, padding in ((3, 1, 1), (3, 2, 1), (1, 1, 0)):
        conv = nn.Conv2d(8, 12, kernel, stride, padding)
        packed = PackedConv(conv)
        for shape in ((1, 8, 5, 5), (2, 8, 16, 12), (1, 8, 5, 5), (2, 8, 7, 7), (5, 8, 3, 9)):
            x = torch.randn(shape, generator=random)
            assert close(packed(x), conv(x))
            assert close(packed(x.contiguous(memory_format=torch.channels_last)), conv(x))
            if kernel == 1:
                assert close(Pointwise(conv)(x), conv(x))


def test_minimal_filtering_is_the_convolution() -> None:
    """In bands and beyond them, of any batch, with another count of channels; where it pays."""
    random = torch.Generator().manual_seed(0)
    for bias, outside, shape in (
        (True, 256, (2, 256, 16, 34)),
        (False, 264, (1, 256, 2, 128)),
        (True, 256, (1, 256, 64, 32)),
    ):
        conv = nn.Conv2d(256, outside, 3, padding=1, bias=bias)
        packed, x = PackedConv(conv), torch.randn(shape, generator=random)
        assert packed.minimal(x.shape)
        assert close(packed(x), conv(x))
        assert set(packed._packed) == {None}
        odd = x[..., :-1]
        assert not packed.minimal(odd.shape)
        assert close(packed(odd), conv(odd))
    for other in (nn.Conv2d(256, 64, 3, padding=1), nn.Conv2d(256, 256, 3, 2, 1)):
        assert not PackedConv(other).minimal(torch.Size(shape))
    assert not PackedConv(conv).minimal(torch.Size((1, 256, 8, 8)))
    assert not PackedConv(conv.bfloat16()).minimal(torch.Size(shape))


def test_doubling_and_its_convolution_are_those_of_the_block() -> None:
    """To twice the size, for which it computes half; and to an odd size, as U-Nets have it."""
    random = torch.Generator().manual_seed(0)
    block = Upsample(12)
    packed = PackedUpsample(block.conv)
    for shape in ((1, 12, 4, 4), (3, 12, 5, 7), (1, 12, 1, 1)):
        x = torch.randn(shape, generator=random)
        assert close(packed(x), block(x))
        size = 2 * shape[2] - 1, 2 * shape[3]
        assert close(packed(x, size), block(x, size))
    halves, x = block.bfloat16(), x.bfloat16()
    assert (PackedUpsample(halves.conv)(x) - halves(x)).abs().max() < 1.5e-2 * halves(x).abs().max()


def test_it_follows_a_lora_in_and_out() -> None:
    """What it drew before comes back bit for bit."""
    bundle, other = (with_own_networks(tiny_bundle()) for _ in "12")
    for parameter in add_lora(other, rank=4, targets="all"):
        parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    learned = lora_of(other)
    packed, given = PackedNetwork.of(bundle.network), inputs(bundle)
    before = packed(*given)
    attach_lora(bundle, learned, "mine", 0.7)
    assert close(packed(*given), bundle.network(*given))
    assert not close(packed(*given), before)
    scale_loras(bundle, {"mine": 0.2})
    assert close(packed(*given), bundle.network(*given))
    detach_lora(bundle, "mine")
    assert torch.equal(packed(*given), before)


def test_it_follows_training() -> None:
    bundle = with_own_networks(tiny_bundle())
    packed, given = PackedNetwork.of(bundle.network), inputs(bundle)
    before = packed(*given)
    for parameter in bundle.network.module.parameters():
        parameter.mul_(1.01)
    assert close(packed(*given), bundle.network(*given))
    assert not close(packed(*given), before)
    weight = bundle.network.module.get_parameter("mid_block.resnets.0.conv1.weight")
    random = torch.Generator().manual_seed(0)
    for _ in range(4):  # of which the allocator may give one the memory of another
        weight.data = torch.randn(weight.shape, generator=random)
        weight.data = torch.randn(weight.shape, generator=random)
        assert close(packed(*given), bundle.network(*given))
    with torch.enable_grad():  # and leaves gradients to the network itself
        x = given[0].requires_grad_(True)
        answer = packed(x, *given[1:])
        assert torch.equal(answer, bundle.network(x, *given[1:]))
        assert answer.requires_grad


def test_it_obeys_the_choice_of_attention() -> None:
    bundle = with_own_networks(tiny_bundle())
    packed, given = PackedNetwork.of(bundle.network), inputs(bundle)
    packed(*given)
    set_attention(bundle.network.module, "eager")
    assert close(packed(*given), bundle.network(*given))
    twin: Any = packed.packing.twin()
    assert all(m.processor is explicit for m in twin.modules() if hasattr(m, "processor"))


class Lacking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such primitive\nat line 7")


@pytest.mark.parametrize("fault", ["they compute something else", "no such primitive$"])
def test_a_wrong_answer_is_told_and_not_given(fault: str) -> None:
    bundle = with_own_networks(tiny_bundle())
    packed, given = PackedNetwork.of(bundle.network), inputs(bundle)
    twin: Any = packed.packing.twin()
    twin.time_act[1].bias.neg_()
    if fault.startswith("no"):
        twin.conv_out = Lacking()
    with pytest.warns(UserWarning, match=f"packed weights are not used on this machine: {fault}"):
        told = packed(*given)
    assert torch.equal(told, bundle.network(*given))
    assert torch.equal(packed(*given), told)  # and is not told again
    packing: Any = packed.packing
    assert not packing.works
    assert (packing._twin, packing._watched._held) == (None, [])
    assert replace(bundle, network=packed).engine == "eager"


def test_the_first_answer_takes_one_call_of_each_and_the_others_one() -> None:
    bundle = with_own_networks(tiny_bundle())
    packed, given = PackedNetwork.of(bundle.network), inputs(bundle)
    calls: list[str] = []
    own = bundle.network.module
    # The twin has the hooks of the network.
    own.register_forward_hook(lambda m, *_: calls.append("network" if m is own else "twin"))
    first = packed(*given)
    assert sorted(calls) == ["network", "twin"]
    assert torch.equal(packed(*given), first)
    assert sorted(calls) == ["network", "twin", "twin"]
    assert not torch.equal(first, bundle.network(*given))  # it is the twin's
    autoencoder, count = with_engine(bundle.network, bundle.autoencoder, "packed")[1], list[int]()
    vae: Any = bundle.modules["vae"]
    vae.decoder.register_forward_hook(lambda *_: count.append(1))
    latents = torch.randn(1, 4, 8, 8)
    autoencoder.decode(latents)
    assert len(count) == 2  # so small that all of it is compared
    autoencoder.decode(torch.randn(2, 4, 8, 8))
    assert len(count) == 3


def test_it_lets_go_of_what_it_cannot_pack_any_more() -> None:
    bundle = with_own_networks(tiny_bundle())
    packed = PackedNetwork.of(bundle.network)
    packed(*inputs(bundle))
    packing: Any = packed.packing
    gone = weakref.ref(packing._twin)
    with torch.backends.mkldnn.flags(enabled=False):
        packed(*inputs(bundle))
    gc.collect()
    assert gone() is None
    assert (packing._twin, packing._watched._held) == (None, [])
    assert close(packed(*inputs(bundle)), bundle.network(*inputs(bundle)))


def test_without_onednn_everything_draws() -> None:
    bundle = with_own_networks(tiny_bundle())
    with torch.backends.mkldnn.flags(enabled=False):
        with pytest.raises(UserError, match="oneDNN"):
            with_engine(bundle.network, bundle.autoencoder, "packed")
        assert with_engine(bundle.network, bundle.autoencoder, "auto")[0] is bundle.network
    theirs = tiny_bundle()
    with pytest.raises(UserError, match="UNet2DConditionModel"):
        with_engine(theirs.network, theirs.autoencoder, "packed")
    assert with_engine(theirs.network, theirs.autoencoder, "auto") == (
        theirs.network,
        theirs.autoencoder,
    )


def test_threads_share_it() -> None:
    bundle = with_own_networks(tiny_bundle())
    network, autoencoder = with_engine(bundle.network, bundle.autoencoder, "packed")
    pipe = LatentDiffusionPipeline(replace(bundle, network=network, autoencoder=autoencoder))

    def draw(number: int) -> Tensor:
        size, edits = (16, 24)[number % 2], ["pag:1"] if number % 3 == 0 else []
        given: dict[str, Any] = {"output_type": "pt", "progress": False, "edits": edits}
        prompt = CAPTIONS[number]
        return pipe(
            prompt, seed=number, num_inference_steps=4, height=size, width=size, **given
        ).images

    serial = [draw(number) for number in range(8)]
    network, autoencoder = with_engine(bundle.network, bundle.autoencoder, "packed")
    pipe = LatentDiffusionPipeline(replace(bundle, network=network, autoencoder=autoencoder))
    with ThreadPoolExecutor(8) as pool:
        for alone, together in zip(serial, pool.map(draw, range(8)), strict=True):
            assert torch.equal(alone, together)


def test_it_keeps_nothing_of_a_run() -> None:
    bundle = with_own_networks(tiny_bundle())
    packed = PackedNetwork.of(bundle.network)
    t = torch.full((2,), 321.0)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    def call(number: int) -> "weakref.ref[Tensor]":
        states = torch.full((2, 7, 16), number / 200)
        size = 8 + number % 5  # no more than two of them are kept
        packed(torch.zeros(2, 4, size, size), t, Condition(states=states))
        return weakref.ref(states)

    for number in range(20):
        call(number)
    after_some = tensors()
    for number in range(180):
        assert call(number)() is None
    assert tensors() <= after_some


def test_the_network_itself_stays_as_it_is() -> None:
    bundle = with_own_networks(tiny_bundle())
    module, given = bundle.network.module, inputs(bundle)
    names, kinds = list(module.state_dict()), [type(m) for m in module.modules()]
    before = bundle.network(*given)
    PackedNetwork.of(bundle.network)(*given)
    assert [type(m) for m in module.modules()] == kinds
    assert list(module.state_dict()) == names
    assert nn.Conv2d in kinds
    assert torch.equal(bundle.network(*given), before)

"""Replayed calls: they are the network's to the last bit, for other numbers than were written."""

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentdiff.diffusion.condition import Condition
from latentdiff.models.attention import sdpa
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.models.engines.packed import PackedNetwork
from latentdiff.models.engines.tape import (
    ReplayedUNet,
    Replaying,
    Tape,
    Unwritable,
    replay_decoding,
)
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.network import DiffusersUNet

BLOCKS = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": [32, 64], "cross_attention_dim": 16, "sample_size": 8},
    "sd2": {
        "block_out_channels": [32, 64],
        "cross_attention_dim": 16,
        "sample_size": 8,
        "use_linear_projection": True,
        "attention_head_dim": [2, 4],
    },
}


def unet_of(config: dict[str, Any], dtype: torch.dtype) -> CrossAttentionUNet:
    kinds = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    torch.manual_seed(0)
    return CrossAttentionUNet({**config, **kinds}).to(dtype).eval().requires_grad_(False)


def twin_of(config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    return PackedNetwork.of(DiffusersUNet(unet_of(config, dtype), 4)).packing.twin()


def given(seed: int, dtype: torch.dtype, masked: bool) -> tuple[Tensor, Tensor, Tensor, Any]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 8, 8, generator=random).to(dtype)
    states = torch.randn(2, 7, 16, generator=random).to(dtype)
    mask = torch.rand(2, 7, generator=random) < 0.7 if masked else None
    return x, torch.rand(2, generator=random) * 1000, states, mask


@pytest.mark.parametrize(
    ("kind", "dtype", "masked"),
    [
        ("sd1", torch.float32, False),
        ("sd2", torch.float32, True),
        ("sd1", torch.bfloat16, True),
        ("sd2", torch.bfloat16, False),
    ],
)
def test_it_answers_as_the_network(kind: str, dtype: torch.dtype, masked: bool) -> None:
    """For other numbers, other texts in turn, the same text again, and times met before."""
    twin = twin_of(CONFIGS[kind], dtype)
    replayed = ReplayedUNet(twin, 1000)
    with torch.no_grad():
        texts = [given(seed, dtype, masked)[2:] for seed in (1, 2)]
        x, t, states, mask = given(0, dtype, masked)
        for call in range(16):
            x, t, _, _ = given(call % 5, dtype, masked)
            states, mask = texts[call % 2]
            answer = replayed(x, t, states, mask)
            assert torch.equal(answer, twin(x, t, states, mask))
            assert not torch.equal(answer, twin(x, t + 100, states, mask))
            assert not torch.equal(answer, twin(x, t, states + 0.5, mask))
        with torch.inference_mode():
            assert torch.equal(replayed(x, t, states, mask), twin(x, t, states, mask))
    (tape,) = replayed._replaying._calls.values()
    assert isinstance(tape, Tape)
    assert len(tape._times) == 5
    assert len(tape._texts) == 2
    gone = weakref.ref(texts[0][0])
    del texts, states
    gc.collect()
    assert gone() is None
    assert not tape._texts
    for number in range(70):
        tape(x, torch.full((2,), float(number)), *given(number, dtype, masked)[2:])
    assert len(tape._times) <= 64
    assert not tape._texts


def test_what_is_told_more_is_no_tape() -> None:
    twin = twin_of(CONFIGS["sd1"], torch.float32)
    replayed, (x, t, states, _) = ReplayedUNet(twin, 1000), given(0, torch.float32, False)
    added = torch.ones(2, 64, 4, 4)
    with torch.no_grad():
        told = [replayed(x, t, states, mid_block_additional_residual=added) for _ in range(6)]
        assert not replayed._replaying._calls
        assert not torch.equal(told[-1], replayed(x, t, states))


@torch.no_grad()
def test_a_tape_follows_its_network() -> None:
    """Weights, hooks and processors that change behind it; other kinds of times; and it goes."""
    module: Any = unet_of(CONFIGS["sd1"], torch.float32)
    unet = DiffusersUNet(module, 4)
    packed = PackedNetwork.of(unet)
    x, t, states, _ = given(0, torch.float32, False)
    condition = Condition(states=states)

    def same(t: Any = t) -> bool:
        told = [packed(x, t, condition) for _ in range(6)]
        expected = unet(x, t, condition)
        return all(bool((each - expected).abs().max() < 1e-5) for each in told)

    def tapes() -> list[Tape]:
        computing: Any = packed.packing.computing(unet)
        calls = getattr(computing.compiled, "_replaying", None)
        return [each for each in calls._calls.values() if isinstance(each, Tape)] if calls else []

    assert same()
    assert same(t[0])
    assert same(t.long())
    assert len(tapes()) == 2
    gone, _ = (weakref.ref(each._of_call) for each in tapes())
    gc.disable()
    try:
        module.conv_in.weight.mul_(1.5)
        assert same()
        assert gone() is None
    finally:
        gc.enable()
    hook = module.mid_block.register_forward_hook(lambda part, told, out: out * 0)
    assert same()
    hook.remove()
    assert same()
    scale = [1.0]
    layer = module.cross_attention()[0]
    layer.processor = lambda *told, **more: scale[0] * sdpa(*told, **more)
    assert same()
    scale[0] = 0.0
    assert same()
    assert not tapes()


@torch.no_grad()
def test_threads_share_its_times() -> None:
    twin = twin_of(CONFIGS["sd1"], torch.float32)
    x, t, states, _ = given(0, torch.float32, False)
    tape = Tape(twin, [x, t, states, None])

    def answer(number: int) -> Tensor:
        return tape(x, torch.full((2,), float(number % 200)), states, None)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert len(list(pool.map(answer, range(600)))) == 600
    finally:
        sys.setswitchinterval(before)


@torch.no_grad()
def test_large_calls_are_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = twin_of(CONFIGS["sd1"], torch.float32)
    numbers = given(0, torch.float32, False)
    monkeypatch.setattr("latentdiff.models.engines.tape._BYTES", 2**16)
    with pytest.raises(Unwritable, match="too large"):
        Tape(twin, numbers)


def test_a_decoder_answers_as_itself_and_goes() -> None:
    torch.manual_seed(0)
    module = KLAutoencoder({"block_out_channels": [32, 32], **BLOCKS}).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        expected = copy.copy(module).decode
        replay_decoding(module, 1000)
        for size in (8, 8, 6, 8, 8, 8, 6, 8, 8):
            latents = torch.randn(1, 4, size, size, generator=random)
            assert torch.equal(module.decode(latents), expected(latents))
    kept: Any = module.decode
    assert sorted(isinstance(each, Tape) for each in kept._calls.values()) == [False, True]
    assert not Replaying(nn.Identity(), nn.Identity(), 2**34)._pays(torch.ones(2, 1, 1, 1))
    gone = weakref.ref(module)
    del module, expected
    assert gone() is None


class Odd(nn.Module):
    """A network with a rule of its own."""

    def __init__(self, rule: Callable[..., Tensor]) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(1))
        self.rule = rule

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        return self.rule(self.kept, x, t, states)


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "it looks": (lambda kept, x, t, states: x * states if x.sum() > 0 else x, "question"),
    "it counts": (lambda kept, x, t, states: x * kept.add_(1), "kept"),
    "it changes a text": (lambda kept, x, t, states: x + states.mul_(t[0]), "kept"),
    "it changes a time": (lambda kept, x, t, states: (t * 2).add_(x[0, 0, 0, 0]) + x, "kept"),
    "it does not see x": (lambda kept, x, t, states: states * 2, "depend on x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replayed_is_called(name: str) -> None:
    rule, reason = REFUSED[name]
    network = Odd(rule)
    numbers = torch.ones(1, 1, 1, 1), torch.full((1,), 3.0), torch.full((1, 1, 1, 1), 2.0), None
    with torch.no_grad(), pytest.raises(Unwritable, match=reason):
        Tape(network, numbers)


def test_what_draws_numbers_is_called() -> None:
    network = Odd(lambda kept, x, t, states: x + torch.randn(1))
    replayed = Replaying(network, network, 1)
    x, t, states = torch.ones(1, 1, 1, 1), torch.ones(1), torch.ones(1, 1, 1)
    with torch.no_grad():
        answers = [float(replayed(x, t, states, None)) for _ in range(8)]
    assert len(set(answers)) == 8
    assert list(replayed._calls.values()) == [None]

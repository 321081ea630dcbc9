"""An engine is a network around another: it must compute the same, and nothing above may notice.

`check_engine` takes the engine as its argument: each one that the library has goes through it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Self

import pytest
import torch
from tiny import CAPTIONS, sd_like, tiny_bundle, tiny_xl, with_own_networks
from torch import Tensor, nn

from latentdiff import Inpaint, LatentDiffusionPipeline
from latentdiff.bundle import Bundle
from latentdiff.diffusion.condition import Condition
from latentdiff.lora import add_lora, attach_lora, lora_of
from latentdiff.models.engines import OpenVinoNetwork, PackedNetwork, cannot_pack
from latentdiff.models.engines.around import AroundNetwork
from latentdiff.models.guidance_embedding import told_scale
from latentdiff.models.network import Network
from latentdiff.models.perturbation import Perturbation

Engine = Callable[[Network], Network]


@dataclass(frozen=True, eq=False)
class ChannelsLast(AroundNetwork):
    """The same network on inputs whose channels lie side by side; a new class, not a subclass."""

    calls: list[int]

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int] = ()
    ) -> Tensor:
        self.calls.append(len(x))
        x = x.contiguous(memory_format=torch.channels_last)
        return self.inner(x, t, condition, perturbed).contiguous()

    def perturbable(self, perturbations: Sequence[Perturbation]) -> Self:
        return replace(self, inner=self.inner.perturbable(perturbations))

    def with_module(self, module: nn.Module) -> Self:
        return replace(self, inner=self.inner.with_module(module))


CALLS: list[int] = []
ENGINES: dict[str, Engine] = {
    "the network itself": lambda network: network,
    "channels last": lambda network: ChannelsLast(network, CALLS),
    "packed": PackedNetwork.of,
    "openvino": lambda network: OpenVinoNetwork.of(network, network),
}
# It converts each shape anew: `test_openvino.py` has a few of these in the short suite.
ABSENT = pytest.mark.skipif(find_spec("openvino") is None, reason="needs the extra openvino")
EACH = [
    pytest.param(name, marks=[pytest.mark.slow, ABSENT] if name == "openvino" else [])
    for name in ENGINES
]
MODELS: dict[str, Callable[[], Bundle]] = {
    "clip": tiny_bundle,
    "t5, masked": lambda: tiny_bundle(tower="t5"),
    "inpainting": lambda: tiny_bundle(in_channels=9),
    "learned variance": lambda: tiny_bundle(learned_variance=True),
    "told its guidance scale": lambda: tiny_bundle(guidance_width=16),
    "xl": tiny_xl,
    "sd1": lambda: sd_like(1),
    "sd2": lambda: sd_like(2),
    "lora": lambda: with_lora(tiny_bundle()),
}


def with_lora(bundle: Bundle) -> Bundle:
    """The same model with a LoRA at a scale of 0.7 in it, a large one."""
    for parameter in add_lora(taught := tiny_bundle(), rank=4, targets="all"):
        parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    bundle = with_own_networks(bundle)
    attach_lora(bundle, lora_of(taught), "mine", 0.7)
    return bundle


def own(model: str) -> Bundle:
    """A model of `MODELS`, with networks of our own."""
    bundle = MODELS[model]()
    return bundle if model == "lora" else with_own_networks(bundle)


def inputs(bundle: Bundle, prompts: Sequence[str], size: int) -> tuple[Tensor, Tensor, Condition]:
    """x_t, times and condition of a call, with all that the network sees."""
    random = torch.Generator().manual_seed(size)
    count, extra = len(prompts), bundle.network.in_channels - 4
    condition = bundle.conditioner.encode(prompts, (2 * size, 2 * size)).condition
    condition = told_scale(condition, bundle.network, 3.0)
    x = torch.randn(count, 4, size, size, generator=random)
    if extra:
        beside = torch.randn(count, extra, size, size, generator=random)
        condition = replace(condition, beside=beside)
    return x, torch.linspace(20, 980, count), condition


def check_engine(engine: Engine, bundle: Bundle, within: float = 1e-5) -> None:
    """Compare over batches and sizes: the largest difference is small beside the output."""
    fast = engine(bundle.network)
    for prompts, size in ((CAPTIONS[:1], 8), (CAPTIONS[:3], 12), (CAPTIONS, 9), (CAPTIONS[:2], 8)):
        given = inputs(bundle, prompts, size)
        wanted, got = bundle.network(*given), fast(*given)
        assert (wanted - got).abs().max() <= within * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", EACH)
def test_an_engine_computes_the_same(engine: str, model: str) -> None:
    check_engine(ENGINES[engine], own(model))


@torch.no_grad()
@pytest.mark.parametrize("model", ["clip", "inpainting", "sd1", "xl"])
def test_packed_bfloat16_is_as_near_to_float32_as_the_network_itself(model: str) -> None:
    """In root mean square, relative to the output: 1 to 2 percent, of weights that are the same."""
    halves, whole = own(model), own(model)
    halves.network.module.bfloat16()
    whole.network.module.bfloat16().float()
    if reason := cannot_pack(halves.network.module):
        pytest.skip(reason)
    x, t, condition = inputs(whole, CAPTIONS[:3], 12)
    wanted = whole.network(x, t, condition)
    rounded, packed = (
        float((network(x, t, condition) - wanted).norm() / wanted.norm())
        for network in (halves.network, PackedNetwork.of(halves.network))
    )
    assert packed <= min(1.2 * rounded, 2.5e-2)


@pytest.mark.parametrize("engine", EACH)
def test_a_pipeline_draws_the_same_by_an_engine(engine: str) -> None:
    """Replaced in a loaded model, under guidance, spoilt attention and an edit of the input."""
    given: dict[str, Any] = {"num_inference_steps": 3, "seed": 2, "output_type": "pt"}
    picture = torch.zeros(1, 4, 8, 8)
    hole = torch.ones(1, 1, 8, 8)
    for kind, edits in (("clip", ["pag:2", "seg:1"]), ("inpainting", [Inpaint(picture, hole)])):
        bundle = with_own_networks(MODELS[kind]())
        fast = replace(bundle, network=ENGINES[engine](bundle.network))
        CALLS.clear()
        plain, other = (
            LatentDiffusionPipeline(b)("a cat", edits=edits, progress=False, **given).images
            for b in (bundle, fast)
        )
        assert (plain - other).abs().max() <= 1e-5
        assert len(CALLS) == (3 if engine == "channels last" else 0)


def test_the_check_sees_a_wrong_engine() -> None:
    def late(network: Network) -> Network:
        class Late(ChannelsLast):
            def __call__(self, x: Tensor, t: Tensor, condition: Condition, perturbed=()) -> Tensor:
                return super().__call__(x, t + 20, condition, perturbed)

        return Late(network, CALLS)

    with pytest.raises(AssertionError), torch.no_grad():
        check_engine(late, with_own_networks(tiny_bundle()))

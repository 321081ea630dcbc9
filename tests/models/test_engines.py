"""An engine is a network around another: it must compute the same, and nothing above may notice.

`check_engine` takes the engine as its argument: each one that the library has goes through it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import pytest
import torch
from tiny import tiny_bundle
from torch import Tensor, nn

from latentdiff import Inpaint, LatentDiffusionPipeline
from latentdiff.bundle import Bundle
from latentdiff.diffusion.condition import Condition
from latentdiff.models.network import Kind, Network
from latentdiff.models.perturbation import Perturbation

Engine = Callable[[Network], Network]


@dataclass(frozen=True, eq=False)
class ChannelsLast:
    """The same network on inputs whose channels lie side by side; a new class, not a subclass."""

    inner: Network
    calls: list[int]

    @property
    def module(self) -> nn.Module:
        return self.inner.module

    @property
    def channels(self) -> int:
        return self.inner.channels

    @property
    def in_channels(self) -> int:
        return self.inner.in_channels

    @property
    def learns_variance(self) -> bool:
        return self.inner.learns_variance

    @property
    def kind(self) -> Kind:
        return self.inner.kind

    @property
    def width(self) -> int:
        return self.inner.width

    @property
    def native_size(self) -> tuple[int, int]:
        return self.inner.native_size

    @property
    def multiple(self) -> int:
        return self.inner.multiple

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

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
}
MODELS: dict[str, dict[str, Any]] = {
    "clip": {},
    "t5, masked": {"tower": "t5"},
    "inpainting": {"in_channels": 9},
    "learned variance": {"learned_variance": True},
}


def check_engine(engine: Engine, bundle: Bundle, within: float = 1e-5) -> None:
    """Compare over batches and sizes: the largest difference is small beside the output."""
    fast, random = engine(bundle.network), torch.Generator().manual_seed(0)
    for prompts, size in ((["a red heart"], 8), (["a cat", "a slice of pizza", "a dog"], 12)):
        condition = bundle.conditioner.encode(prompts, (2 * size, 2 * size)).condition
        extra = bundle.network.in_channels - 4
        shape = len(prompts), 4, size, size
        x = torch.randn(shape, generator=random)
        if extra:
            beside = torch.randn(len(prompts), extra, size, size, generator=random)
            condition = replace(condition, beside=beside)
        t = torch.linspace(20, 980, len(prompts))
        wanted, got = bundle.network(x, t, condition), fast(x, t, condition)
        assert (wanted - got).abs().max() <= within * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_computes_the_same(engine: str, model: str) -> None:
    check_engine(ENGINES[engine], tiny_bundle(**MODELS[model]))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pipeline_draws_the_same_by_an_engine(engine: str) -> None:
    """Replaced in a loaded model, under guidance, spoilt attention and an edit of the input."""
    given: dict[str, Any] = {"num_inference_steps": 3, "seed": 2, "output_type": "pt"}
    picture = torch.zeros(1, 4, 8, 8)
    hole = torch.ones(1, 1, 8, 8)
    for kind, edits in (("clip", ["pag:2"]), ("inpainting", [Inpaint(picture, hole)])):
        bundle = tiny_bundle(**MODELS[kind])
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
        check_engine(late, tiny_bundle())

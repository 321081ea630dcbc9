"""The compiled engine: code of the user's own, for its shapes alone, checked, shared by threads.

One tiny U-Net is compiled here by the real compiler, without what makes code fast.
"""

import contextlib
import gc
import io
import re
import shutil
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tiny import CAPTIONS, WIDTH, draw_weights, tiny_bundle, with_fast, with_own_networks
from torch import Tensor
from torch._inductor import config

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.bundle import Bundle, Steps
from latentdiff.cli import main
from latentdiff.diffusion.condition import Condition
from latentdiff.lora import add_lora, attach_lora, detach_lora, lora_of
from latentdiff.models.engines import (
    CompiledNetwork,
    PackedNetwork,
    with_engine,
)
from latentdiff.models.engines.compiling import compiling
from latentdiff.models.engines.native import Missing

QUICKLY = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    "cpp.vec_isa_ok": False,
}


@dataclass(frozen=True, slots=True)
class World:
    model: Path
    packages: Path


def one_level(seed: int = 0) -> Bundle:
    """A model whose U-Net is as small as can be, and whose autoencoder cannot be compiled."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=8,
    )
    bundle = tiny_bundle(vae="vq")
    return replace(bundle, network=bundle.network.with_module(draw_weights(unet, seed)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("compiled")
    model = one_level().save(folder / "model")
    with pytest.MonkeyPatch.context() as patch, config.patch(QUICKLY):
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert main(["compile", str(model), "--size", "16", "--batch", "1"]) == 0
        assert re.search(
            r"4 steps take [0-9.]+ seconds with it, and [0-9.]+ packed", said.getvalue()
        )
        yield World(model, folder / "cache/latentdiff/compiled")


def load(world: World, engine: Any = "compiled") -> Bundle:
    return Bundle.load(world.model, device="cpu", engine=engine)


def inputs(count: int = 2) -> tuple[Tensor, Tensor, Condition]:
    random = torch.Generator().manual_seed(count)
    x, states = (
        torch.randn(count, 4, 8, 8, generator=random),
        torch.randn(count, 12, WIDTH, generator=random),
    )
    return x, torch.full((count,), 321.0), Condition(states=states)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def draw(bundle: Bundle, number: int = 0, **given: Any) -> Tensor:
    pipe = LatentDiffusionPipeline(bundle)
    prompt = [CAPTIONS[0]] * given.pop("count", 1)
    return pipe(
        prompt, seed=number, num_inference_steps=3, output_type="pt", progress=False, **given
    ).images


@torch.no_grad()
def test_code_computes_what_the_network_computes(world: World) -> None:
    assert len(list(world.packages.glob("*.so"))) == 1
    assert not world.packages.stat().st_mode & 0o077
    bundle = load(world, "auto")
    network: Any = bundle.network
    assert isinstance(network, CompiledNetwork)
    assert isinstance(network.inner, PackedNetwork)
    itself = load(world, "eager").network
    for scale in (1.0, -0.5, 3.0):  # it was compared for another input
        x, t, condition = inputs()
        given = scale * x, t / 2 + 100 * scale, condition
        assert close(network.fast(*given), itself(*given))
        assert torch.equal(network(*given), network.fast(*given))
    # a part of a larger tensor is a call of the same shape
    x, t, condition = inputs(4)
    assert close(
        network.fast(x[1:3], t[1:3], condition.take([1, 2])),
        itself(x[1:3], t[1:3], condition.take([1, 2])),
    )
    assert (draw(bundle) - draw(load(world, "eager"))).abs().max() <= 1e-5


def test_what_no_code_is_for_is_left_to_the_engine_inside(world: World) -> None:
    """Other shapes with one line where the engine was asked for, and without where it was not."""
    itself = load(world, "eager")
    for edits, count in ((["pag:2"], 1), ([], 2)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fast = draw(load(world, "auto"), edits=edits, count=count)
        assert (fast - draw(itself, edits=edits, count=count)).abs().max() <= 1e-5
    with pytest.warns(UserWarning, match="no compiled code for these weights and shapes: 4 x") as w:
        draw(load(world), count=2)
    assert len(w) == 1
    bundle = load(world)
    x, t, condition = inputs()
    answer = bundle.network(x.requires_grad_(True), t, condition)
    answer.sum().backward()
    assert x.grad is not None


@torch.no_grad()
def test_a_lora_is_drawn_and_taken_out_bit_for_bit(world: World) -> None:
    other, bundle = load(world, "eager"), load(world, "auto")
    for parameter in add_lora(other, rank=2, targets="all"):
        parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    before = bundle.network(*inputs())
    attach_lora(bundle, lora_of(other), "mine", 0.7)
    network: Any = bundle.network
    with pytest.raises(Missing):
        network.fast(*inputs())
    assert not close(network(*inputs()), before)
    itself = load(world, "eager")
    attach_lora(itself, lora_of(other), "mine", 0.7)
    assert close(network(*inputs()), itself.network(*inputs()))
    detach_lora(bundle, "mine")
    assert torch.equal(network.fast(*inputs()), before)


@torch.no_grad()
def test_code_of_other_weights_threads_or_attention_is_none(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = one_level(seed=1).save(world.model.parent / "other")
    for change in ("weights", "threads", "attention", "training"):
        given: dict[str, Any] = {"device": "cpu", "attention": "auto"}
        model = other if change == "weights" else world.model
        given["attention"] = "eager" if change == "attention" else "auto"
        with monkeypatch.context() as patch:
            if change == "threads":
                patch.setattr(torch, "get_num_threads", lambda: 3)
            if change == "training":
                bundle = load(world, "auto")
                next(bundle.network.module.parameters()).mul_(2)
                with pytest.raises(Missing):
                    bundle.network.fast(*inputs())  # pyright: ignore
                continue
            assert isinstance(Bundle.load(model, engine="auto", **given).network, PackedNetwork)
            with pytest.raises(UserError, match=r"no code of this model .*`latentdiff compile`"):
                Bundle.load(model, engine="compiled", **given)


def test_a_folder_that_others_can_write_to_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a line, and never opened; also where it, or one above it, is another user's."""

    def refused(why: str) -> None:
        with pytest.raises(UserError, match=f"engine 'compiled': .*{why}"):
            load(world)
        with pytest.warns(UserWarning, match=f"compiled code is not used: .*{why}"):
            assert isinstance(load(world, "auto").network, PackedNetwork)

    for folder, mode in ((world.packages, 0o720), (world.packages.parent, 0o777)):
        before = folder.stat().st_mode
        loaded = load(world, "auto")
        folder.chmod(mode)
        refused("others may write to it")
        with pytest.warns(UserWarning, match="compiled code is not used"):  # changed since
            draw(loaded)
        folder.chmod(before)
    with monkeypatch.context() as patch:
        patch.setattr("os.getuid", lambda: 4711)
        refused("it is another user's")
    load(world)


def test_wrong_or_damaged_code_is_told_and_not_used(world: World) -> None:
    (right,) = world.packages.glob("*.so")
    bundle = one_level(seed=2)
    itself = Bundle.load(bundle.save(world.model.parent / "third"))
    network, _ = with_engine(itself.network, itself.autoencoder, "packed")
    fast = CompiledNetwork.of(itself.network, network)
    name = right.stem.split("-")
    fast.code.at_hand()
    name[1] = str(fast.code._name).split("-")[1]
    target = world.packages / f"{'-'.join(name)}.so"
    for content, told in ((right, "they compute something else"), (None, "compiled code")):
        target.unlink(missing_ok=True)  # what is loaded must not change in place
        if content is None:
            target.write_bytes(b"\x7fELF no code")
        else:
            shutil.copyfile(content, target)
        loaded = Bundle.load(world.model.parent / "third", engine="auto", device="cpu")
        assert isinstance(loaded.network, CompiledNetwork)
        with pytest.warns(UserWarning, match=told):
            answer = draw(loaded)
        assert (answer - draw(itself)).abs().max() <= 1e-5
    target.unlink()


def test_threads_share_it(world: World) -> None:
    bundle = load(world)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        serial = [draw(bundle, number) for number in range(8)]
        bundle = load(world)
        with ThreadPoolExecutor(8) as pool:
            for alone, together in zip(
                serial, pool.map(lambda n: draw(bundle, n), range(8)), strict=True
            ):
                assert torch.equal(alone, together)


@torch.no_grad()
def test_it_keeps_nothing_of_200_calls(world: World) -> None:
    network: Any = load(world).network

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    def call() -> "weakref.ref[Tensor]":
        given = inputs()
        network.fast(*given)
        return weakref.ref(given[0])

    for _ in range(3):
        call()
    before = tensors()
    assert not [None for _ in range(200) if call()() is not None]
    assert tensors() <= before


def test_without_a_compiler_the_command_says_so_and_everything_draws(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from torch._inductor import cpp_builder

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpp_builder.cpp_compiler_search.cache_clear()
    assert main(["compile", str(world.model)]) == 2
    assert capsys.readouterr().err.startswith("error: there is no C++ compiler here")
    assert not (tmp_path / "cache").exists()
    given = ["--model", str(world.model), "--out", str(tmp_path), "--seed", "1"]
    assert main(["generate", "a cat", "--steps", "2", *given]) == 0
    assert capsys.readouterr().err == "seed 1\n"
    assert main(["generate", "a cat", "--engine", "compiled", *given]) == 2
    assert "latentdiff compile" in capsys.readouterr().err


@pytest.mark.slow
def test_code_of_weights_with_a_lora_in_them_is_found_with_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own of few steps, which is drawn without guidance, and one that is named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = with_fast(one_level().save(tmp_path / "model"), Steps("leading", within="leading"))
    lora = str(model / "fast/pytorch_lora_weights.safetensors:0.5")
    with config.patch(QUICKLY):
        assert main(["compile", str(model), "--size", "16", "--fast"]) == 0
        assert main(["compile", str(model), "--size", "16", "--lora", lora]) == 0
    fast, slow = (
        LatentDiffusionPipeline.from_pretrained(model, fast=True, engine=engine)
        for engine in ("compiled", "eager")
    )
    given: dict[str, Any] = {"seed": 0, "height": 16, "width": 16, "output_type": "pt"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = fast("a cat", **given).images
    assert fast.bundle.engine == "compiled"
    assert (drawn - slow("a cat", **given).images).abs().max() <= 1e-5
    assert isinstance(Bundle.load(model, engine="auto").network, PackedNetwork)
    line = ["generate", "a cat", "--model", str(model), "--out", str(tmp_path / "drawn")]
    line += ["--seed", "1", "--steps", "2", "--size", "16", "--lora", lora]
    assert main([*line, "--engine", "compiled"]) == 0


def test_a_network_of_diffusers_is_not_compiled() -> None:
    bundle = tiny_bundle()
    with (
        pytest.raises(UserError, match=r"cannot be compiled: .*UNet2DConditionModel"),
        compiling(bundle.network, print),
    ):
        pass


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["t5, masked", "inpainting", "bfloat16"])
def test_any_call_is_compiled(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and further channels, and in bfloat16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle = with_own_networks(
        tiny_bundle(
            tower="t5" if kind.startswith("t5") else "clip",
            in_channels=9 if kind == "inpainting" else 4,
        )
    )
    if kind == "bfloat16":
        bundle.network.module.bfloat16()
    condition = bundle.conditioner.encode(CAPTIONS[:3], (16, 16)).condition
    random = torch.Generator().manual_seed(0)
    if kind == "inpainting":
        condition = replace(condition, beside=torch.randn(3, 5, 8, 8, generator=random))
    given = torch.randn(3, 4, 8, 8, generator=random), torch.linspace(20, 980, 3), condition
    said: list[str] = []
    with compiling(bundle.network, said.append) as network:
        network(*given)
    assert sum(line.startswith("compiling") for line in said) == 1
    fast, _ = with_engine(bundle.network, bundle.autoencoder, "compiled")
    assert isinstance(fast, CompiledNetwork)
    within = 1.5e-2 if kind == "bfloat16" else 1e-5
    expected = bundle.network(*given)
    assert (fast.fast(*given) - expected).abs().max() <= within * expected.abs().max()

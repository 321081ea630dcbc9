"""The engine of OpenVINO: checked, shared by threads, with LoRAs, and never there unasked."""

import gc
import sys
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CAPTIONS, tiny_bundle, tiny_xl, with_own_networks
from torch import Tensor

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.bundle import Bundle
from latentdiff.cli import main
from latentdiff.diffusion.condition import Condition
from latentdiff.lora import add_lora, attach_lora, detach_lora, lora_of
from latentdiff.models.engines import OpenVinoAutoencoder, OpenVinoNetwork, openvino, with_engine

needs_openvino = pytest.mark.skipif(
    find_spec("openvino") is None, reason="needs the extra openvino"
)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle().save(tmp_path_factory.mktemp("openvino") / "model")


@pytest.fixture(scope="module")
def loaded(model: Path) -> Bundle:
    """In the engine, and converted for the calls of `draw`."""
    return Bundle.load(model, device="cpu", engine="openvino")


def inputs(bundle: Bundle, count: int = 2) -> tuple[Tensor, Tensor, Condition]:
    random = torch.Generator().manual_seed(count)
    condition = bundle.conditioner.encode(CAPTIONS[:count], (16, 16)).condition
    if extra := bundle.network.in_channels - 4:
        condition = replace(condition, beside=torch.randn(count, extra, 8, 8, generator=random))
    return torch.randn(count, 4, 8, 8, generator=random), torch.full((count,), 321.0), condition


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def draw(bundle: Bundle, number: int = 0, **given: Any) -> Tensor:
    pipe = LatentDiffusionPipeline(bundle)
    told: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt", "progress": False}
    return pipe(CAPTIONS[0], seed=number, **told, **given).images


@needs_openvino
@pytest.mark.parametrize(
    "kind",
    [
        "t5, masked",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("inpainting", "xl")),
        "bfloat16",
    ],
)
def test_it_computes_what_the_network_computes(kind: str) -> None:
    bundle = with_own_networks(
        tiny_xl()
        if kind == "xl"
        else tiny_bundle(
            tower="t5" if kind.startswith("t5") else "clip",
            in_channels=9 if kind == "inpainting" else 4,
        )
    )
    if kind == "bfloat16":
        bundle.network.module.bfloat16()
    fast: Any = with_engine(bundle.network, bundle.autoencoder, "openvino")[0]
    x, t, condition = inputs(bundle)
    for scale in (1.0, -0.5, 3.0):  # it was compared for another input
        given = scale * x, t / 2 + 100 * scale, condition
        answer, wanted = fast.fast(*given), bundle.network(*given)
        assert answer.dtype == wanted.dtype
        assert apart(answer, wanted) <= (3e-2 if kind == "bfloat16" else 1e-5)
    assert torch.equal(fast(*given), answer)


@needs_openvino
def test_a_pipeline_draws_by_it_and_tells_nobody(
    loaded: Bundle, model: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Its library would send what it is used for to its makers, by the package that it brings."""
    assert isinstance(loaded.network, OpenVinoNetwork)
    assert isinstance(loaded.autoencoder, OpenVinoAutoencoder)
    assert loaded.engine == "packed"  # nothing was computed yet
    itself = Bundle.load(model, device="cpu")
    assert (draw(loaded) - draw(itself)).abs().max() <= 1e-5
    assert loaded.engine == "openvino"
    assert loaded.autoencoder.code.used
    assert "openvino_telemetry" not in sys.modules
    assert not [each for each in recwarn if issubclass(each.category, UserWarning)]


@needs_openvino
def test_what_it_lacks_is_left_to_the_engine_inside_with_a_line(
    loaded: Bundle, model: Path
) -> None:
    itself = Bundle.load(model, device="cpu")
    with pytest.warns(UserWarning, match="does not compute spoilt attention here") as told:
        spoilt = draw(loaded, edits=["pag:2"])
    assert len([each for each in told if "spoilt" in str(each.message)]) == 1
    assert (spoilt - draw(itself, edits=["pag:2"])).abs().max() <= 1e-5
    with torch.enable_grad():
        x, t, condition = inputs(loaded)
        loaded.network(x.requires_grad_(True), t, condition).sum().backward()
    assert x.grad is not None


@needs_openvino
def test_a_lora_is_merged_and_taken_out_bit_for_bit(loaded: Bundle, model: Path) -> None:
    other, itself = (Bundle.load(model, device="cpu") for _ in "12")
    for parameter in add_lora(other, rank=4, targets="all"):
        parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    network: Any = loaded.network
    given = inputs(loaded)
    before = network.fast(*given)
    for bundle in (loaded, itself):
        attach_lora(bundle, lora_of(other), "mine", 0.7)
    within = network.fast(*given)
    assert apart(within, itself.network(*given)) <= 1e-5
    assert apart(within, before) > 1e-2
    detach_lora(loaded, "mine")
    assert torch.equal(network.fast(*given), before)


@needs_openvino
def test_threads_share_it_and_it_keeps_nothing_of_200_calls(loaded: Bundle) -> None:
    serial = [draw(loaded, number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda number: draw(loaded, number), range(8)))
    assert all(torch.equal(a, b) for a, b in zip(serial, together, strict=True))
    network: Any = loaded.network

    def call() -> "weakref.ref[Tensor]":
        given = inputs(loaded)
        network.fast(*given)
        return weakref.ref(given[0])

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    call()
    before = tensors()
    assert not [None for _ in range(200) if call()() is not None]
    assert tensors() <= before


@pytest.mark.parametrize("fault", ["cannot convert", "computes something else"])
def test_a_fault_is_told_and_the_engine_inside_draws(
    fault: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(method: Any, call: Any) -> Any:
        if fault.startswith("cannot"):
            raise ValueError("no such operation")
        return method, call

    def answer(converted: Any, tensors: list[Tensor]) -> Tensor:
        method, call = converted
        args, kwargs = call.arguments(tensors)
        return 1.01 * method(*args, **kwargs)

    monkeypatch.setattr(openvino, "find_spec", lambda name: name)
    monkeypatch.setattr(openvino, "_convert", convert)
    monkeypatch.setattr(openvino, "_answer", answer)
    bundle = Bundle.load(model, device="cpu", engine="openvino")
    told = "no such operation" if fault.startswith("cannot") else "they compute something else"
    with pytest.warns(UserWarning, match=f"OpenVINO is not used.*{told}") as lines:
        picture = draw(bundle)
    assert len(lines) == 2  # of the U-Net and of the decoder
    assert (picture - draw(Bundle.load(model, device="cpu"))).abs().max() <= 1e-5
    assert bundle.engine == "packed"


def test_it_converts_a_shape_once_and_keeps_four(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[str] = []

    def convert(method: Any, call: Any) -> Any:
        converted.append(str(call).partition(" ")[0])
        return method, call

    def answer(kept: Any, tensors: list[Tensor]) -> Tensor:
        method, call = kept
        args, kwargs = call.arguments(tensors)
        return method(*args, **kwargs)

    monkeypatch.setattr(openvino, "find_spec", lambda name: name)
    monkeypatch.setattr(openvino, "_convert", convert)
    monkeypatch.setattr(openvino, "_answer", answer)
    bundle = Bundle.load(model, device="cpu", engine="openvino")
    for count in (1, 2, 1, 3, 4, 4, 5, 5, 4, 1):
        bundle.network(*inputs(bundle, count))
    assert converted == ["1", "2", "3", "4", "5", "1"]


def test_it_is_refused_where_it_is_not_installed_and_never_imported_unasked(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def imported() -> None:
        raise AssertionError("OpenVINO is imported")

    monkeypatch.setattr(openvino, "_library", imported)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for engine in ("auto", "packed"):
            draw(Bundle.load(model, device="cpu", engine=engine))
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'latentdiff\[openvino\]'"):
        Bundle.load(model, engine="openvino")
    given = ["--model", str(model), "--out", str(tmp_path), "--engine", "openvino"]
    assert main(["generate", "a cat", *given]) == 2
    assert capsys.readouterr().err.startswith("error: engine 'openvino': the package is not")
    assert not list(tmp_path.iterdir())

"""Networks computed by OpenVINO, Intel's library: converted at the first call of each shape.

Nothing is kept on the disk; the library is imported where the engine is asked for, and only there.
"""

import sys
import threading
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any, Self

import torch
from torch import Tensor, nn

from latentdiff.errors import warn
from latentdiff.models.autoencoder import Autoencoder, DiffusersAutoencoder
from latentdiff.models.engines.native import (
    Call,
    Method,
    Missing,
    NativeAutoencoder,
    NativeNetwork,
    cannot_compile,
)
from latentdiff.models.engines.packages import call_key
from latentdiff.models.engines.state import Checks, Watched, merged
from latentdiff.models.network import Network

_KEPT = 4  # shapes: each has weights of its own
_BESIDE_TIME = "timestep_cond", "class_labels", "added_cond_kwargs"


def cannot_convert(module: nn.Module) -> str | None:
    """The reason why OpenVINO does not compute a network here; None where it may."""
    if find_spec("openvino") is None:
        return "the package is not installed; pip install 'latentdiff[openvino]'"
    return cannot_compile(module)


class OpenVino:
    """A method of a network, computed by OpenVINO.

    Args:
        module: the network.
        what: the name of the method.
    """

    def __init__(self, module: nn.Module, what: str) -> None:
        self._module, self._what = module, what
        self._lock = threading.Lock()
        self._watched = Watched(module)
        self._threads = 0
        self._models: dict[str, Any] = {}
        self._told = False
        self.used = False

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """See `Code`."""
        call = Call(args, kwargs)
        with self._lock:
            model = self._model(call)
        if model is None:
            raise Missing
        self.used = True
        return _answer(model, call.tensors)

    def of(self, module: nn.Module) -> Self:
        """See `Code.of`."""
        return type(self)(module, self._what)

    def left(self, what: str) -> None:
        """See `Code.left`."""
        if not self._told:
            self._told = True
            warn(f"OpenVINO does not compute {what} here: the engine inside does")

    def _model(self, call: Call) -> Any:
        """What computes a call; None where OpenVINO cannot, or gives something else."""
        if self._watched.changed() or self._threads != torch.get_num_threads():
            self._threads = torch.get_num_threads()
            self._models = {}
        key = call_key(call.arranged, call.tensors)
        if key not in self._models:
            others = list(self._models.items())[1 - _KEPT :]
            self._models = dict(others)  # before the next one takes memory
            self._models[key] = self._converted(call)
        return self._models[key]

    def _converted(self, call: Call) -> Any:
        try:
            model = _convert(getattr(merged(self._module), self._what), call)
        except Exception as error:  # converters raise anything
            warn(f"OpenVINO is not used: {' '.join(str(error).split()):.200}")
            return None
        args, kwargs = call.arguments(call.tensors)
        checks = Checks(self._module, "OpenVINO is not used")
        slow = getattr(self._module, self._what)
        same = checks.passes(
            self._what, lambda: _answer(model, call.tensors), lambda: slow(*args, **kwargs)
        )
        return model if same else None


@torch.no_grad()
def _convert(method: Any, call: Call) -> Any:
    """A method of a network, compiled for the shapes of a call."""
    library = _library()
    with warnings.catch_warnings():  # the tracer's, of what depends on a shape: it stays the same
        warnings.simplefilter("ignore")
        graph: Any = torch.jit.trace(
            Method(method, call).eval(), tuple(call.tensors), check_trace=False
        )  # the answers are compared later
        model = library.convert_model(graph, example_input=tuple(call.tensors))
    model.reshape({number: list(t.shape) for number, t in enumerate(call.tensors)})
    halves = next(method.__self__.parameters()).dtype == torch.bfloat16
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if halves else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # other processes have cores, too
    }
    return _core().compile_model(model, "CPU", settings)


def _answer(model: Any, tensors: list[Tensor]) -> Tensor:
    """What a converted method gives; each call has a request of its own, for threads' sake."""
    request = model.create_infer_request()
    for number, tensor in enumerate(tensors):
        request.set_input_tensor(number, _theirs(tensor))
    request.infer()
    answer = request.get_output_tensor(0)
    if answer.element_type == _library().Type.bf16:
        return torch.from_numpy(answer.data.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(answer.data.copy())


def _theirs(tensor: Tensor) -> Any:
    """A tensor as one of OpenVINO, of the same memory."""
    library, tensor = _library(), tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which numpy does not know
        values = tensor.view(torch.int16).numpy()
        return library.Tensor(values, list(tensor.shape), library.Type.bf16)
    return library.Tensor(tensor.numpy(), shared_memory=True)


@cache
def _core() -> Any:
    return _library().Core()


@cache
def _library() -> Any:
    """OpenVINO, which by itself would tell its makers of every import and every conversion."""
    before = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # pyright: ignore[reportArgumentType]
    try:
        import openvino  # pyright: ignore[reportMissingImports]
    finally:
        del sys.modules["openvino_telemetry"]
        if before is not None:
            sys.modules["openvino_telemetry"] = before
    return openvino


class _UNet(OpenVino):
    """A U-Net without its embedding of time.

    In bfloat16 OpenVINO would round times, and then compute sines of them.
    """

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        sample, time, *rest = args
        told = {key: kwargs.pop(key, None) for key in _BESIDE_TIME}
        unet: Any = self._module
        return super().__call__(sample, unet.embed_time(sample, time, **told), *rest, **kwargs)


class OpenVinoNetwork(NativeNetwork):
    """A network that OpenVINO computes, LoRAs merged."""

    @classmethod
    def of(cls, network: Network, inner: Network) -> Self:
        """This engine around another of a network."""
        return cls.around(network, inner, _UNet(network.module, "forward"))


class OpenVinoAutoencoder(NativeAutoencoder):
    """An autoencoder that decodes by OpenVINO."""

    @classmethod
    def of(cls, autoencoder: DiffusersAutoencoder, inner: Autoencoder) -> Self:
        """This engine around another of an autoencoder."""
        return cls.around(autoencoder, inner, OpenVino(autoencoder.module, "decode"))

"""Calls of a small network without its Python: operations written down once, and replayed.

Where a call takes some milliseconds, a fifth of them is Python between hundreds of operations. What
is written down holds for one shape. What depends on the times alone is computed once for each, and
what depends on the text alone once for each text.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Calls of a shape before its operations are written down, which takes two further calls.
_PATIENCE = 3
# Shapes whose operations are kept, and times of which what depends on them is.
_SHAPES, _TIMES = 4, 64
# Weights times places up to which Python takes a part of a call that is worth it, and bytes of all
# that a call computes: while it is written down nothing of it is let go.
_SMALL, _BYTES = 2**34, 2**27

# What a value depends on: a sum of these.
_X, _TIME, _TEXT = 1, 2, 4


class Unwritable(Exception):
    """A call that cannot be replayed."""


class _Value(NamedTuple):
    """A value, by its number."""

    number: int


class _Step(NamedTuple):
    """One operation.

    Attributes:
        function: an overload.
        args: what it is given, values in the place of tensors.
        named: what it is given by name.
        out: the value, or values, that it gives.
        needs: what these depend on.
        values: all in `args`, `named` and `out`.
    """

    function: Any
    args: tuple[Any, ...]
    named: dict[str, Any]
    out: Any
    needs: int
    values: tuple[_Value, ...]


def _part(needs: int) -> int:
    """The function that computes what needs these: of times, of texts, or of every call."""
    return needs if needs in (0, _TIME, _TEXT) else _X


class _Writing(TorchDispatchMode):
    """Writes down every operation that runs, and what its answer depends on.

    Args:
        inputs: tensors, each with what it is.
    """

    def __init__(self, inputs: Iterable[tuple[Tensor, int]]) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.tensors: list[Tensor] = []  # held, so that no other tensor gets one's id or memory
        self.needs: list[int] = []
        self._numbers: dict[int, int] = {}
        self._memory: dict[int, int] = {}  # what the first value there needs
        self._bytes = 0
        for tensor, needs in inputs:
            self.value(tensor, needs)
        self._given = len(self.tensors)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports the compiler

    def value(self, tensor: Tensor, needs: int = 0) -> _Value:
        """The value of a tensor; one that was not met before is new."""
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            self.needs.append(needs)
            if not tensor.is_mkldnn:  # packed weights, whose memory is oneDNN's
                self._remember(tensor, needs)
        return _Value(self._numbers[id(tensor)])

    def _remember(self, tensor: Tensor, needs: int) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._memory:
            self._memory[address] = needs
            self._bytes += tensor.nbytes if needs else 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        met: list[_Value] = []
        given, named = self._met(tuple(args), met), self._met(dict(kwargs or {}), met)
        needs = 0
        for value in met:
            needs |= self.needs[value.number]
        self._check(func, args, needs)
        answer = func(*args, **(kwargs or {}))
        out = self._met(answer, met, needs)
        if not all(type(each) is _Value for each in (out if _many(out) else [out])):
            raise Unwritable(f"{func} answers a question")
        self.steps.append(_Step(func, given, named, out, needs, tuple(dict.fromkeys(met))))
        return answer

    def _met(self, given: Any, met: list[_Value], needs: int = 0) -> Any:
        """Values in the place of tensors, all of which are added to `met`."""
        if isinstance(given, Tensor):
            met.append(self.value(given, needs))
            return met[-1]
        if isinstance(given, dict):
            return {key: self._met(each, met, needs) for key, each in given.items()}
        return type(given)(self._met(each, met, needs) for each in given) if _many(given) else given

    def crossing(self, part: int) -> list[_Value]:
        """Values of another part that the function of every call needs; what is given it has."""
        steps = [step for step in self.steps if _part(step.needs) == _X]
        used = dict.fromkeys(value for step in steps for value in step.values)
        given = range(self._given)
        return [v for v in used if _part(self.needs[v.number]) == part and v.number not in given]

    def _check(self, function: Any, args: Sequence[Any], needs: int) -> None:
        if self._bytes > _BYTES:
            raise Unwritable("it is too large")
        if function._schema.is_mutable:
            owner = self._memory[args[0].untyped_storage().data_ptr()]
            if _part(owner) != _part(needs) or owner == 0:
                raise Unwritable(f"{function} changes what is kept")


def _many(given: Any) -> bool:
    return type(given) in (list, tuple)


class _Source:
    """The Python source of what was written down, and the objects that it names."""

    def __init__(self, writing: _Writing) -> None:
        self._writing = writing
        self.names: dict[str, Any] = {}

    def function(self, part: int, given: Sequence[_Value], wanted: Sequence[_Value]) -> str:
        """The source of one function, which forgets each value after its last use."""
        steps = [step for step in self._writing.steps if _part(step.needs) == part]
        last = {v: n for n, step in enumerate(steps) for v in step.values}
        kept = {*wanted, *given}
        lines = [f"def part_{part}({', '.join(map(self.told, given))}):"]
        for number, step in enumerate(steps):
            lines.append(f"    {self.told(step.out)} = {self._call(step)}")
            ends = [v for v in step.values if last[v] == number and v not in kept]
            if gone := [v for v in ends if _part(self._writing.needs[v.number]) == part]:
                lines.append(f"    del {', '.join(map(self.told, gone))}")
        lines.append(f"    return {self.told(tuple(wanted))}")
        return "\n".join(lines)

    def _call(self, step: _Step) -> str:
        name = f"f{len(self.names)}"
        self.names[name] = step.function._op  # without the Python around it
        named = [f"{key}={self.told(value)}" for key, value in step.named.items()]
        return f"{name}({', '.join([*map(self.told, step.args), *named])})"

    def told(self, given: Any) -> str:
        """Name a value, a list or any other argument."""
        if type(given) is _Value:
            name = f"v{given.number}"
            if self._writing.needs[given.number] == 0:
                self.names[name] = self._writing.tensors[given.number]
            return name
        if isinstance(given, list):
            return f"[{', '.join(map(self.told, given))}]"
        if isinstance(given, tuple):
            return f"({''.join(self.told(each) + ', ' for each in given)})"
        plain = given is None or isinstance(given, bool | int | str)
        if plain or (isinstance(given, float) and math.isfinite(given)):
            return repr(given)
        name = f"o{len(self.names)}"
        self.names[name] = given
        return name


class Tape:
    """A recording of what a network computes for one shape.

    Args:
        network: (x, t, states, mask), or x alone -> a tensor.
        given: these, of that shape; no other tensor that it sees may change.

    Raises:
        Unwritable: it asks what is in a tensor, or changes what is kept.
    """

    def __init__(self, network: Callable[..., Tensor], given: Sequence[Tensor | None]) -> None:
        kinds = [_X, _TIME, _TEXT, _TEXT][: len(given)]
        inputs = [(each, kind) for each, kind in zip(given, kinds, strict=True) if each is not None]
        with _Writing(inputs) as writing:
            answer = network(*given)
        result = writing.value(answer)
        if _part(writing.needs[result.number]) != _X:
            raise Unwritable("the answer does not depend on x")
        crossing = {part: writing.crossing(part) for part in (_TIME, _TEXT)}
        values = [_Value(number) for number in range(len(inputs))]
        source = _Source(writing)
        every = [*values, *crossing[_TIME], *crossing[_TEXT]]
        text = [
            source.function(_TIME, values[1:2], crossing[_TIME]),
            source.function(_TEXT, values[2:], crossing[_TEXT]),
            source.function(_X, every, [result]),
        ]
        exec("\n".join(text), source.names)
        # Taken out of the names, which they hold: so all goes with the last of them.
        self._of_time, self._of_text, self._of_call = (
            source.names.pop(f"part_{part}") for part in (_TIME, _TEXT, _X)
        )
        self._times: dict[tuple[float, ...], tuple[Tensor, ...]] = {}
        self._texts: dict[int, tuple[list[int], Tensor | None, tuple[Tensor, ...]]] = {}

    def __call__(self, x: Tensor, *told: Tensor | None) -> Tensor:
        """Answer as the network does."""
        if not told:
            return self._of_call(x)[0]
        t, states, mask = told
        assert t is not None
        assert states is not None
        texts = [states] if mask is None else [states, mask]
        return self._of_call(x, t, *texts, *self._timed(t), *self._read(texts, mask))[0]

    def _timed(self, t: Tensor) -> tuple[Tensor, ...]:
        key = tuple(t.tolist())
        known = self._times.get(key)
        if known is None:
            known = self._of_time(t)
            others = list(self._times.items())[1 - _TIMES :]
            self._times = dict([*others, (key, known)])  # of which another thread may drop some
        return known

    def _read(self, told: list[Tensor], mask: Tensor | None) -> tuple[Tensor, ...]:
        """Values of states and mask; the last of each states are kept until these go."""
        states = told[0]
        versions = [0 if each.is_inference() else each._version for each in told]
        known = self._texts.get(id(states))
        if known is None:
            weakref.finalize(states, self._texts.pop, id(states), None)
        if known is None or known[0] != versions or known[1] is not mask:
            known = versions, mask, self._of_text(*told)
            self._texts[id(states)] = known
        return known[2]


class Replaying:
    """A method of a network, which is replayed where that pays, and called where not.

    Args:
        method: what a `Tape` takes; no gradients are asked for.
        module: the network, which never changes, but that it may get hooks.
        weights: how many it has.
    """

    def __init__(self, method: Callable[..., Tensor], module: nn.Module, weights: int) -> None:
        self._method, self._weights = method, weights
        parts = list(module.modules())
        self._hooks = [part._forward_pre_hooks for part in parts]
        self._hooks += [part._forward_hooks for part in parts]
        self._calls: dict[Any, int | Tape | None] = {}

    def __call__(self, x: Tensor, *told: Tensor | None) -> Tensor:
        """Answer as the method does."""
        given = x, *told
        if not self._pays(x):
            return self._method(*given)
        key = tuple(None if each is None else _kind(each) for each in given)
        known = self._calls.get(key, 0)
        if isinstance(known, Tape):
            return known(*given)
        answer = self._method(*given)
        if known is not None:
            following = known + 1 if known < _PATIENCE else self._written(given, answer)
            others = [item for item in self._calls.items() if item[0] != key][1 - _SHAPES :]
            self._calls = dict([*others, (key, following)])  # at once, for other threads' sake
        return answer

    def _pays(self, x: Tensor) -> bool:
        places = x.shape[0] * x.shape[2] * x.shape[3]
        small = self._weights * places <= _SMALL
        return small and not any(self._hooks) and not torch.is_autocast_enabled("cpu")

    def _written(self, given: Sequence[Tensor | None], answer: Tensor) -> Tape | None:
        """The tape of a call, written down of other numbers; None where it answers otherwise."""
        try:
            with torch.inference_mode(False), torch.no_grad():
                tape = Tape(self._method, [_other(each) for each in given])
        except Unwritable:
            return None
        again = tape(*given)  # pyright: ignore[reportArgumentType]
        return tape if torch.equal(again, answer) else None


class ReplayedUNet:
    """A U-Net that is replayed where it is told no more than x, times and texts.

    Args:
        module: it never changes.
        weights: how many it has.
    """

    def __init__(self, module: nn.Module, weights: int) -> None:
        self._orig_mod = module  # the name that `torch.compile` gives it
        self._replaying = Replaying(module, module, weights)

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """See `latentdiff.models.cross_attention_unet.CrossAttentionUNet.forward`."""
        given = sample, timestep, encoder_hidden_states, encoder_attention_mask
        alone = isinstance(timestep, Tensor) and timestep.ndim == 1
        if not alone or any(each is not None for each in more.values()):
            return self._orig_mod(*given, **more)
        return self._replaying(*given)


def replay_decoding(twin: Any, weights: int) -> None:
    """Have a `KLAutoencoder` that never changes replay its `decode`."""
    decode = weakref.WeakMethod(twin.decode)  # else it would hold itself

    def method(latents: Tensor) -> Tensor:
        known = decode()
        assert known is not None
        return known(latents)

    twin.decode = Replaying(method, twin, weights)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _other(given: Tensor | None) -> Tensor | None:
    """A tensor of the same kind with other numbers."""
    if given is None or given.dtype == torch.bool:
        return None if given is None else given.clone()
    return given.mul(0.5).add(0.25) if given.is_floating_point() else given.add(1)

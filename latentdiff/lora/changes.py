"""Changes of a weight: a low-rank product, LoHa, LoKr and DoRA.

Each is a function of few numbers that gives a change as large as the weight. While it is in a
model, the weight holds the sum, so that whatever computes with the weight computes with it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.lora.factors import MAX_RANK, Change, Factors

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """(alpha / rank) up @ down: Hu et al. 2021, eq. 3."""

    factors: Factors

    def of(self, weight: Tensor) -> Tensor:
        down, up = (half.to(weight.device).float() for half in (self.factors.down, self.factors.up))
        change = up.flatten(1) @ down.flatten(1) * (self.factors.alpha / self.factors.rank)
        return change.reshape(weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        named = {"lora_down.weight": self.factors.down, "lora_up.weight": self.factors.up}
        return {**named, "alpha": torch.tensor(self.factors.alpha)}


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard:
    """LoHa: (alpha / rank) (w1_a w1_b) * (w2_a w2_b), place by place.

    Hyeon-Woo et al. 2022 (FedPara), prop. 1; of convolutions with cores t1 and t2, prop. 3.

    Attributes:
        parts: hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, perhaps hada_t1 and hada_t2.
        scale: alpha / rank.
    """

    parts: Tensors
    scale: float

    def of(self, weight: Tensor) -> Tensor:
        parts = {name: value.to(weight.device).float() for name, value in self.parts.items()}
        first, second = (
            _product(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}"))
            for n in (1, 2)
        )
        return (first * second * self.scale).reshape(weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        rank = len(self.parts["hada_w1_b"])
        return {**self.parts, "alpha": torch.tensor(self.scale * rank)}


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """LoKr: (alpha / rank) w1 (x) w2, each whole or a product of two (Yeh et al. 2024, sec. 3.2).

    Attributes:
        parts: lokr_w1, or lokr_w1_a and lokr_w1_b; lokr_w2, or lokr_w2_a and lokr_w2_b, perhaps
            lokr_t2.
        scale: alpha / rank; 1 where both are whole, as LyCORIS and ComfyUI read them.
    """

    parts: Tensors
    scale: float

    def of(self, weight: Tensor) -> Tensor:
        parts = {name: value.to(weight.device).float() for name, value in self.parts.items()}
        first, second = (
            parts[f"lokr_w{n}"]
            if f"lokr_w{n}" in parts
            else _product(parts[f"lokr_w{n}_a"], parts[f"lokr_w{n}_b"], parts.get(f"lokr_t{n}"))
            for n in (1, 2)
        )
        kernel = weight.shape[2:]
        second = second.reshape(len(weight) // len(first), -1, *kernel).contiguous()
        first = first.reshape(*first.shape, *[1] * len(kernel))
        return torch.kron(first, second) * self.scale

    def tensors(self) -> dict[str, Tensor]:
        ranks = [len(self.parts[name]) for name in _LOKR_RANKS if name in self.parts]
        if ranks:
            return {**self.parts, "alpha": torch.tensor(self.scale * ranks[0])}
        whole = {**self.parts, "lokr_w1": self.parts["lokr_w1"] * self.scale}
        return {**whole, "alpha": torch.tensor(1.0)}


_LOKR_RANKS = ("lokr_w1_b", "lokr_w2_b")


@dataclass(frozen=True, slots=True, eq=False)
class Decomposed:
    """DoRA: m V / |V| - W with V = W + the change inside (Liu et al. 2024, eq. 5).

    Its strength multiplies the whole of that, as in ComfyUI.

    Attributes:
        inside: the change of the direction.
        magnitude: m [out, 1, ...], a norm for each output, or [1, in, ...], for each input.
        axis: 0 for outputs, 1 for inputs.
    """

    inside: Change
    magnitude: Tensor
    axis: int

    def of(self, weight: Tensor) -> Tensor:
        plain = weight.float()
        turned = plain + self.inside.of(weight)
        magnitude = self.magnitude.to(weight.device).float()
        axes = [axis for axis in range(plain.ndim) if axis != self.axis]
        norm = turned.square().sum(axes, keepdim=True).sqrt() + torch.finfo(torch.float32).eps
        return magnitude * turned / norm - plain

    def tensors(self) -> dict[str, Tensor]:
        return {**self.inside.tensors(), "dora_scale": self.magnitude}


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a [m, r] b [r, n]; with a core [r, r, k, k] a [r, m] and b [r, n] to [m, n, k, k]."""
    if core is None:
        return a @ b
    return torch.einsum("ijkl,ip,jq->pqkl", core, a, b)


def hadamard(parts: Tensors, scale: float, shape: tuple[int, ...], name: str) -> Hadamard:
    """A LoHa for a weight of this shape.

    Raises:
        UserError: its tensors do not make one.
    """
    outside, inside, *kernel = shape
    cores = [parts.get("hada_t1"), parts.get("hada_t2")]
    pairs = [(parts.get(f"hada_w{n}_a"), parts.get(f"hada_w{n}_b")) for n in (1, 2)]
    if len(parts) != (4 if cores == [None, None] else 6):
        raise UserError(f"{name}: a factor is missing beside it.")
    for (a, b), core in zip(pairs, cores, strict=True):
        _check_product(a, b, core, outside, inside, kernel, name)
    return Hadamard(parts, scale)


def kronecker(parts: Tensors, scale: float, shape: tuple[int, ...], name: str) -> Kronecker:
    """A LoKr for a weight of this shape.

    Raises:
        UserError: its tensors do not make one.
    """
    outside, inside, *kernel = shape
    (a, b), (c, d) = _side(parts, 1, [], name), _side(parts, 2, kernel, name)
    if a * c != outside or b * d != inside:
        raise UserError(
            f"{name}: a LoKr of {[a, b]} and {[c, d]} does not make {list(shape)}; it was made for "
            "another model."
        )
    return Kronecker(parts, scale)


def _side(parts: Tensors, number: int, kernel: list[int], name: str) -> tuple[int, int]:
    """Rows and columns of one of the two factors of a LoKr.

    Raises:
        UserError: its tensors do not make one.
    """
    whole, a, b, core = (
        parts.get(f"lokr_{end.format(number)}") for end in ("w{}", "w{}_a", "w{}_b", "t{}")
    )
    places = math.prod(kernel)
    if whole is not None:
        flat = whole.numel() // max(1, len(whole)) if whole.ndim else 0
        around = whole.ndim == 2 or [*whole.shape[2:]] == kernel
        if (a, b, core) == (None, None, None) and around and flat and flat % places == 0:
            return len(whole), flat // places
    elif a is not None and b is not None and a.ndim == b.ndim == 2:
        rows, columns = (a.shape[1], b.shape[1]) if core is not None else (len(a), b.shape[1])
        columns //= places if core is None else 1
        _check_product(a, b, core, rows, columns, kernel, name)
        return rows, columns
    raise UserError(f"{name}: its tensors do not make a LoKr.")


def _check_product(
    a: Tensor | None,
    b: Tensor | None,
    core: Tensor | None,
    outside: int,
    inside: int,
    kernel: list[int],
    name: str,
) -> None:
    """Pass factors of a matrix, so that nothing larger than the weight is made of them."""
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or not 1 <= len(b) <= MAX_RANK:
        raise UserError(f"{name}: a factor is missing, or its shape is none of LyCORIS.")
    if core is None:
        wanted = (outside, len(b)), (len(b), inside * math.prod(kernel))
    else:
        rank = len(a)
        wanted = (rank, outside), (len(b), inside)
        if list(core.shape) != [rank, len(b), *kernel] or rank > MAX_RANK or len(kernel) != 2:
            raise UserError(f"{name}: its core of {list(core.shape)} does not fit its factors.")
    if (a.shape, b.shape) != wanted:
        raise UserError(
            f"{name}: factors of {list(a.shape)} and {list(b.shape)} do not make "
            f"{[outside, inside, *kernel]}; it was made for another model."
        )


def decomposed(
    inside: Change, magnitude: Tensor, shape: tuple[int, ...], name: str, *, outputs: bool
) -> Decomposed:
    """A DoRA for a weight of this shape.

    Args:
        inside: the change of the direction.
        magnitude: norms of outputs, or of inputs.
        shape: of the weight.
        name: for messages.
        outputs: whether its name says that they are of outputs; else their shape does.

    Raises:
        UserError: they are neither.
    """
    ones = [1] * (len(shape) - 2)
    if magnitude.numel() == shape[0] and (outputs or magnitude.shape[0] == shape[0]):
        return Decomposed(inside, magnitude.reshape(shape[0], 1, *ones), 0)
    if magnitude.numel() == shape[1] and not outputs:
        return Decomposed(inside, magnitude.reshape(1, shape[1], *ones), 1)
    raise UserError(
        f"{name}: {list(magnitude.shape)} are not the norms of {list(shape)}; it was made for "
        "another model."
    )

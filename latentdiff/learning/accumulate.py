"""Micro-batches that fit into memory: gradients are accumulated, pictures processed in parts."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, distributed, nn

from latentdiff.errors import UserError

_BUCKET = 2**25  # bytes

Item = TypeVar("Item")
Result = TypeVar("Result")
Terms = Callable[[Sequence[Item]], dict[str, Tensor]]
"""Means of each term over the items of a micro-batch, scalars; "loss" has the graph."""


class Accumulation:
    """This process's share of a step, walked through in micro-batches of `micro` items.

    Where one is too large for the memory of any process, the step starts again from its beginning
    with micro-batches half as large on every process. What a step computes is a function of its
    items alone, so the global batch, the losses and the gradients stay what they were.

    Args:
        split: FSDP2 splits the weights. It then exchanges them, and averages the gradients, in the
            middle of each micro-batch, where processes cannot agree to begin again.
        shrinks: the mean loss of smaller micro-batches is that of the whole.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        micro: int,
        *,
        split: bool = False,
        shrinks: bool = True,
    ) -> None:
        self.accelerator = accelerator
        self.micro = micro
        self.split = split
        self.shrinks = shrinks
        self.room: int | None = None  # for a micro-batch, once one was too large
        self.signal = 0  # the highest that any process had noted when the last step was agreed on

    def gradients(
        self,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        share: Sequence[Item],
        terms: Terms[Item],
        signal: int = 0,
    ) -> dict[str, Tensor]:
        """Leave in `parameters` the gradient of the mean loss over the global batch.

        Args:
            modules: what the loss goes through, as Accelerate prepared it.
            share: this process's items of the step, equally many on each process.
            signal: the number of a signal that this process has noted, or 0.

        Returns:
            The mean of every term over the global batch.

        Raises:
            UserError: not even one item fits into memory, or a micro-batch does not and cannot
                shrink.
        """
        while True:
            means = self._try(modules, share, terms)
            if means is None and self.split:
                raise UserError(
                    f"out of memory with micro-batches of {self.micro}, which cannot shrink where "
                    "the weights are split: raise optim.accumulation; the same command then goes "
                    "on from the last checkpoint"
                )
            if means is None and not self.shrinks:
                raise UserError(
                    f"out of memory with a batch of {self.micro}, which cannot shrink where a "
                    "picture's loss is of the whole batch: lower optim.batch_size or data.size"
                )
            failed, self.signal = self.agreed(int(means is None), signal)
            if means is not None and not failed:
                return self._average(parameters, means)
            for parameter in parameters:
                parameter.grad = None
            self._halve()

    def _try(
        self, modules: Sequence[nn.Module], share: Sequence[Item], terms: Terms[Item]
    ) -> dict[str, Tensor] | None:
        """Gradients and means over the share; None where memory ran out, with nothing kept alive.

        With whole weights processes exchange nothing in here: one that fails in the middle leaves
        none waiting.
        """
        sums: dict[str, Tensor] = {}
        try:
            with ExitStack() as stack:
                for module in modules if not self.split else ():
                    stack.enter_context(self.accelerator.no_sync(module))
                for first in range(0, len(share), self.micro):
                    part = share[first : first + self.micro]
                    weight = len(part) / len(share)
                    values = terms(part)
                    self.accelerator.backward(values["loss"] * weight)
                    for name, value in values.items():
                        sums[name] = sums.get(name, 0.0) + weight * value.detach().float()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return sums

    def agreed(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes."""
        if self.accelerator.num_processes == 1:
            return list(numbers)
        agreed = torch.tensor(numbers, device=self.accelerator.device)
        distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
        return agreed.tolist()

    def _average(
        self, parameters: Sequence[nn.Parameter], means: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Gradients, in place, and means over the processes.

        In buckets that stay the same: those of DDP change after its first step, and with them the
        order of the sums, so that a resumed run would not be the uninterrupted one.
        """
        world = self.accelerator.num_processes
        if world == 1:
            return means
        packed = torch.stack(list(means.values()))
        own = () if self.split else parameters  # FSDP2 has averaged them
        for bucket in _buckets([packed, *(p.grad for p in own if p.grad is not None)]):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            distributed.all_reduce(flat)
            parts = flat.div_(world).split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
        return dict(zip(means, packed, strict=True))

    def _halve(self) -> None:
        if self.micro == 1:
            raise UserError(
                "out of memory with one picture at a time: lower data.size or set precision: bf16; "
                "the same command then goes on from the last checkpoint"
            )
        self.micro //= 2
        self.room = self.micro
        _free()


def in_parts(
    items: Sequence[Item], most: int, work: Callable[[Sequence[Item]], Sequence[Result]]
) -> Iterator[Result]:
    """The result of each item in turn, `most` worked on together, half as many at a time from
    where memory runs out; out of memory is raised for one alone.

    Args:
        work: some items -> a result for each, which does not depend on the others.
    """
    done = 0
    while done < len(items):
        part = items[done : done + most]
        results = _try_part(part, work)
        if results is None:
            most = len(part) // 2
            _free()
            continue
        yield from results
        done += len(part)


def _try_part(
    part: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
) -> Sequence[Result] | None:
    """The results; None where memory ran out for more than one item, with nothing kept alive."""
    try:
        return work(part)
    except (RuntimeError, MemoryError) as error:
        if len(part) == 1 or not is_out_of_memory(error):
            raise
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that Python, torch or a device ran out of memory."""
    known = MemoryError, torch.OutOfMemoryError
    return isinstance(error, known) or (
        isinstance(error, RuntimeError) and should_reduce_batch_size(error)
    )


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # nothing where no GPU is in use


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, in lists of one type and at most _BUCKET bytes, or of one."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    yield bucket

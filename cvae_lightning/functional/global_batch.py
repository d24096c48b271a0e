"""Means over the global batch, the union of the batches of all processes, with exact gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cvae_lightning.functional.precision import at_least_float32

_reduce_over_processes: ContextVar[bool] = ContextVar("reduce_over_processes", default=True)


@contextmanager
def local_batch() -> Iterator[None]:
    """Within this context batch statistics are those of this process alone, and nothing is communicated.

    For evaluation loops, where processes may see different numbers of batches and a collective call would hang.
    """
    token = _reduce_over_processes.set(False)
    try:
        yield
    finally:
        _reduce_over_processes.reset(token)


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def global_batch_mean(values: Tensor) -> Tensor:
    """Mean over the first dimension and over all processes, whatever the number of rows on each.

    Sum and count are reduced in one call. The loss that every process computes from the result is that of the whole
    batch, and so is its gradient once DDP has averaged it over processes. Every process must make the same calls in the
    same order; evaluation loops use `local_batch`.

    Args:
        values: the rows of this process; at least one row in the global batch.

    Shape:
        values: [B, ...] -> [...], at least fp32.

    Example:
        >>> global_batch_mean(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
        tensor([2., 1.])
    """
    values = at_least_float32(values)
    if not (dist.is_available() and dist.is_initialized() and _reduce_over_processes.get()):
        return values.mean(0)
    count = values.new_tensor([values.shape[0]])
    sums_and_count = _AllReduceSum.apply(torch.cat([values.sum(0).flatten(), count]))
    return (sums_and_count[:-1] / sums_and_count[-1].detach()).view(values.shape[1:])

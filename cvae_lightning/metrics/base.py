"""What all metrics of the package share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric


class FixedPrecision(Metric):
    """A metric whose states keep their dtype wherever the module that holds it goes.

    ``bf16-true`` and ``16-true`` cast whole modules by ``module.to(dtype)``, and a sum in bf16 stands still after a few
    hundred addends. `set_dtype` still casts.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        def moved(state: Tensor) -> Tensor:
            result = fn(state)
            return result if self._dtype_convert or result.dtype == state.dtype else state.to(result.device)

        return super()._apply(moved, exclude_state)


class SumStatistics(FixedPrecision):
    """A metric whose states are sums over everything it has seen, reduced by a sum over processes.

    Floating sums are kept in fp64 and counts in int64, so neither the number of batches nor the number of processes
    changes the result. Updates are out of place: spawned processes may share the memory of the initial states, and
    would all add to it.

    The last result outlives `reset()`, so that a figure can be drawn after its epoch has ended.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._latest: Any = None

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Register a state of zeros that is summed over processes."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    @abstractmethod
    def result(self) -> Any:
        """Derive the result from the reduced states."""

    def compute(self) -> Any:
        """Return the result over everything seen by all processes since the last reset."""
        self._latest = self.result()
        return self._latest

    def latest(self) -> Any:
        """Return the result of the updates so far; after a reset, the one computed last.

        After updates this is `compute()`: a collective call unless its result is cached.
        """
        if self.update_called or self._latest is None:
            return self.compute()
        return self._latest


def check_counts(**numbers: int) -> None:
    """Raise a ValueError unless every number is at least 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def check_shape(name: str, values: Tensor, *expected: int | str) -> None:
    """Raise a ValueError unless ``values`` has the expected shape; a letter stands for any size."""
    same_rank = values.dim() == len(expected)
    if not same_rank or any(isinstance(e, int) and e != size for e, size in zip(expected, values.shape, strict=True)):
        raise ValueError(f"{name} must have shape [{', '.join(map(str, expected))}], got {list(values.shape)}")


def check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Raise a ValueError unless all indices lie in low..high - 1."""
    if values.numel() and (int(values.min()) < low or int(values.max()) >= high):
        received = f"{int(values.min())}..{int(values.max())}"
        raise ValueError(f"{name} must lie in {low}..{high - 1}, got {received}: check num_{name} and the labels")


def check_names(metric: str, received: Any, known: tuple[str, ...]) -> None:
    """Raise a ValueError if a name was not announced to the metric."""
    unknown = sorted(set(received) - set(known))
    if unknown:
        raise ValueError(f"{metric} was built for the names {list(known)}, got also {unknown}: add them to `names`")

"""Rules for the dtype of statistics, autocast, and gradients too small to count."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

NEGLIGIBLE = 1e-12
"""Share of the largest gradient below which one is dropped: far below what fp32 keeps of a sum of the two."""


def at_least_float32(values: Tensor) -> Tensor:
    """Return ``values`` in fp32, or unchanged if they already are fp32 or fp64: sums and logs of bf16 lose too much."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which nothing is cast; also for devices that know no autocast."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def same_autocast(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Return what makes contexts that cast as is done now, also for devices that know no autocast.

    They keep no casts of weights: one that was made without gradients would be taken where they are wanted.
    """
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return partial(torch.autocast, device.type, dtype=dtype, enabled=enabled, cache_enabled=False)


def without_negligible_gradients(values: Tensor) -> Tensor:
    """Return ``values``; their gradient is set to 0 where it is below 1e-12 of its largest entry.

    A sharp posterior weighs a latent that does not explain y by e^-50 or less. Products of such gradients with
    activations fall below the normal numbers of fp32, and matrix products of denormal numbers take a CPU more than a
    hundred times as long. What is dropped would be lost in any sum with the others; nan and inf stay.
    """
    if values.requires_grad and values.numel():
        values.register_hook(_drop_negligible)
    return values


def _drop_negligible(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:  # of another result alone
        return None
    size = gradient.abs()
    return gradient.masked_fill(size < NEGLIGIBLE * size.amax(), 0)

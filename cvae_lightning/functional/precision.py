"""One rule for the dtype of statistics."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return ``values`` in fp32, or unchanged if they already are fp32 or fp64: sums and logs of bf16 lose too much."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

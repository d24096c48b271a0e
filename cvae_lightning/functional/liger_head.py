"""The NLL alone by the Triton kernel of Liger-Kernel (https://github.com/linkedin/Liger-Kernel), an option on a GPU."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version
from torch import Tensor

LIGER_VARIABLE = "CVAE_LIGHTNING_LIGER"
LEAST_VERSION = "0.8.5"
"""Before, gradients of unreduced losses were wrong without an error wherever tokens differ in their weight."""


def liger_wanted(device: torch.device) -> bool:
    """Return whether the environment asks for Liger's kernel and the device can run it.

    Raises:
        ImportError: if it asks for it on a GPU, and the package is missing or too old.
    """
    if os.environ.get(LIGER_VARIABLE) != "1" or device.type != "cuda":
        return False
    _check_version()
    return True


@cache
def _check_version() -> None:
    """Look the package up, once where it is right."""
    try:
        found = version("liger-kernel")
    except PackageNotFoundError:
        found = None
    if found is None or Version(found) < Version(LEAST_VERSION):
        have = "is not installed" if found is None else f"is {found}"
        raise ImportError(
            f"{LIGER_VARIABLE}=1 needs liger-kernel >= {LEAST_VERSION}, which {have}: "
            f"pip install 'liger-kernel>={LEAST_VERSION}', or unset {LIGER_VARIABLE}"
        )


def liger_head(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Return the NLL [K, N] of N targets; states [K, N, D], weight [V, D], bias [V] | None.

    The kernel makes the logits of a few rows at a time, and again in the backward pass.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    latents = states.shape[0]
    rows = states.flatten(0, 1) * scale
    nll, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        rows.to(weight.dtype),
        weight,
        targets.repeat(latents),
        None if bias is None else (bias * scale).to(weight.dtype),
        None,  # weight of a class
        -100,  # ignored target; there is none
        0.0,  # square of the logsumexp
        0.0,  # label smoothing
        "none",
        softcap,
        False,  # the square's share apart
        torch.float32,  # of the sum of the weight's gradient
    )
    return nll.unflatten(0, (latents, -1))

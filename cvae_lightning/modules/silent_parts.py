"""Parts of a module that the objective does not reach, while DDP waits for the gradients of all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cvae_lightning.functional.graph import leaves
from cvae_lightning.modules.sharding import is_sharded


class SilentParts:
    """What no active term of an objective reads, between two optimizer steps."""

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] | None = None

    def expected_by_ddp(self, module: nn.Module, total: Tensor) -> Tensor:
        """Return the total, with gradients of 0 for silent parts of the module where DDP waits for gradients."""
        if not (total.requires_grad and averages_gradients(module)):
            return total
        silent = silent_parameters(module, total)
        before = {id(p) for p in (silent if self._parameters is None else self._parameters)}
        self._parameters = [p for p in silent if id(p) in before]  # in all batches of the optimizer step
        return with_zero_gradients(total, silent) if silent else total

    def drop_gradients(self) -> None:
        """Leave silent parts to no decay and no moments, as in a single process; call before an optimizer step."""
        for parameter in self._parameters or ():
            parameter.grad = None
        self._parameters = None


def averages_gradients(module: nn.Module) -> bool:
    """Whether several processes each hold the whole module, so that DDP averages their gradients."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several and not is_sharded(module)


def silent_parameters(module: nn.Module, total: Tensor) -> list[nn.Parameter]:
    """Return the trained parameters of those children of a module of which the graph of ``total`` reaches none.

    A child counts as a whole: under gradient checkpointing the graph may not show all that it reaches.
    """
    reached = {id(leaf) for leaf in leaves(total)}
    parts = [[p for p in part.parameters() if p.requires_grad] for part in module.children()]
    return [p for part in parts if not any(id(p) in reached for p in part) for p in part]


def with_zero_gradients(total: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Return ``total`` as it is, whose backward pass gives the parameters a gradient of 0."""
    result: Tensor = _ZeroGradients.apply(total, *parameters)
    return result


class _ZeroGradients(torch.autograd.Function):
    """Unlike 0 * sum(parameters) it reads no weight, which may be infinite."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)

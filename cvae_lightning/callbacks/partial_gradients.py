"""Checkpoints in the middle of gradient accumulation, which resume without losing the batches accumulated so far."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

KEY = "accumulated_gradients"
"""Name of the gradients in a checkpoint."""


class PartialGradients(Callback):
    """Stores the gradients of an optimizer step that has begun but not been taken.

    Lightning saves whenever it is asked to, also between the batches of ``accumulate_grad_batches`` (after a
    validation there, and at the first batch after a resume), but leaves the gradients out: a run resumed from such a
    file would miss those batches. Files saved between optimizer steps hold nothing more than without this callback.

    Under DDP the mean over processes is stored, so that the step taken after a resume is the one that was begun. Where
    the strategy divides the model over processes (FSDP2), gradients are such means already.
    """

    def __init__(self) -> None:
        self._begun = False
        self._restored: dict[str, Tensor] = {}

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there are gradients without a step."""
        self._begun = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note that the step is taken."""
        self._begun = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the gradients of the step that has begun; runs on every rank."""
        if not self._begun:
            return
        gradients = {name: p.grad.detach() for name, p in pl_module.named_parameters() if p.grad is not None}
        checkpoint[KEY] = {name: _mean(gradient, trainer.world_size) for name, gradient in gradients.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the gradients until the model is on its device."""
        self._restored = checkpoint.get(KEY, {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the gradients back."""
        parameters = dict(pl_module.named_parameters())
        for name, gradient in self._restored.items():
            parameters[name].grad = _like(gradient, parameters[name])
        self._begun, self._restored = bool(self._restored), {}


def _mean(gradient: Tensor, world_size: int) -> Tensor:
    """Return the mean over processes, whole."""
    if isinstance(gradient, DTensor):
        return gradient.full_tensor().cpu()
    gradient = gradient.clone()
    if world_size > 1:
        dist.all_reduce(gradient)
        gradient /= world_size
    return gradient


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient where, and divided as, its parameter is."""
    if isinstance(parameter, DTensor):
        gradient = gradient.to(parameter.device, parameter.dtype)
        return distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
    return gradient.to(parameter)

"""Stops a run whose loss is no longer finite, before the optimizer writes it into the weights."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class NonFiniteLossError(ValueError):
    """The training loss became NaN or infinite."""


class NanGuard(Callback):
    """Checks the training loss before every backward pass and names the term and the step at fault.

    The raw terms come from the module's ``last_terms: dict[str, Tensor]``. Under DDP all ranks stop together.

    Args:
        every_n_batches: check every n-th batch; reading the loss waits for the GPU, so raise it if that shows.
    """

    def __init__(self, every_n_batches: int = 1) -> None:
        if every_n_batches < 1:
            raise ValueError(f"NanGuard every_n_batches must be >= 1, got {every_n_batches}")
        self.every_n_batches = every_n_batches
        self._batches = 0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Raise NonFiniteLossError if the loss of this batch, on any rank, is not finite."""
        self._batches += 1
        if self._batches % self.every_n_batches:
            return
        finite = bool(torch.isfinite(loss.detach()).all())
        if trainer.world_size > 1:
            everywhere = trainer.strategy.reduce_boolean_decision(finite, all=True)
            if everywhere:
                return
            if finite:
                raise NonFiniteLossError(f"another process met a loss that is not finite at step {trainer.global_step}")
        if finite:
            return
        terms = {name: value.detach().float() for name, value in getattr(pl_module, "last_terms", {}).items()}
        bad = [f"{name} = {value.mean().item()}" for name, value in terms.items() if not torch.isfinite(value).all()]
        culprit = ", ".join(bad) or "no single term, but the weighted total"
        raise NonFiniteLossError(
            f"the training loss is {loss.mean().item()} at optimizer step {trainer.global_step} (epoch "
            f"{trainer.current_epoch}); not finite: {culprit}. Weights were not updated. Lower the learning rate, set "
            "trainer.gradient_clip_val, or check that term's weight"
        )

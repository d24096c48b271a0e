"""Stops a run whose loss is no longer finite, before the optimizer writes it into the weights."""

from __future__ import annotations

import torch
import torch.distributed as dist
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
        message = None if bool(torch.isfinite(loss.detach()).all()) else self._describe(trainer, pl_module, loss)
        if trainer.world_size > 1 and not trainer.strategy.reduce_boolean_decision(message is None, all=True):
            everywhere: list[str | None] = [None] * trainer.world_size
            dist.all_gather_object(everywhere, message)
            message = next(text for text in everywhere if text)  # the same on every rank, so that it is shown once
        if message:
            raise NonFiniteLossError(message)

    @staticmethod
    def _describe(trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> str:
        terms = {name: value.detach().float() for name, value in getattr(pl_module, "last_terms", {}).items()}
        bad = [f"{name} = {value.mean().item()}" for name, value in terms.items() if not torch.isfinite(value).all()]
        culprit = ", ".join(bad) or "no single term, but the weighted total"
        rank = f", rank {trainer.global_rank}" if trainer.world_size > 1 else ""
        return (
            f"the training loss is {loss.mean().item()} at optimizer step {trainer.global_step} (epoch "
            f"{trainer.current_epoch}{rank}); not finite: {culprit}. Weights were not updated. Lower the learning "
            "rate, set trainer.gradient_clip_val, or check that term's weight"
        )

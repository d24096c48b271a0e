"""Evaluations of a checkpoint are logged at the step that it was saved at."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class CheckpointStep(Callback):
    """Lets ``validate``, ``test`` and ``predict`` of a checkpoint know its step; Lightning logs them at step 0."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the counts of the training that the checkpoint comes from."""
        counts = checkpoint.get("loops", {}).get("fit_loop")
        if trainer.state.fn != TrainerFn.FITTING and counts:
            trainer.fit_loop.load_state_dict(counts)

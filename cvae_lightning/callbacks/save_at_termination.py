"""Saves a run that is told to end (SIGTERM), so that nothing since the last checkpoint is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException


class SaveAtTermination(Callback):
    """Writes ``last.ckpt`` beside the other checkpoints when SIGTERM ends a training; a resume goes on from there.

    Lightning ends after the batch at hand then, and saves nothing. In a validation nothing is written either, unless it
    is over and the epoch goes on: a run that goes on from the last checkpoint repeats the validation. With several
    processes the last checkpoint stands, since they may learn of the signal at different steps.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save at the last batch of an epoch; Lightning ends behind the epoch then, where a resume is not exact."""
        if trainer.received_sigterm and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save between two batches of an epoch."""
        between = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if isinstance(exception, SIGTERMException) and trainer.state.stage == RunningStage.TRAINING and between:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        checkpoint: Any = trainer.checkpoint_callback
        if trainer.world_size > 1 or not isinstance(checkpoint, ModelCheckpoint):
            return
        if not checkpoint.dirpath or not checkpoint.save_last:
            return
        target = Path(checkpoint.dirpath) / f"{checkpoint.CHECKPOINT_NAME_LAST}{checkpoint.FILE_EXTENSION}"
        trainer.save_checkpoint(target, checkpoint.save_weights_only)
        rank_zero_info(f"terminated: saved {target} at step {trainer.global_step}")

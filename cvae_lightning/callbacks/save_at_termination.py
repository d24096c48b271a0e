"""Saves a run that is told to end (SIGTERM), so that nothing since the last checkpoint is lost."""

from __future__ import annotations

import signal
import threading
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
    is over and the epoch goes on: a run that goes on from the last checkpoint repeats the validation.

    Several processes learn of the signal at different moments, or only one of them does. Lightning's own handler
    communicates there and then, in the midst of whatever another process is communicating, and hangs. In its place
    each remembers the signal, and all of them end after the same batch.
    """

    def __init__(self) -> None:
        self._told = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the signal from the first batch on."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the signal, where there was no sanity check."""
        self._listen(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the signal."""
        self._listen(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the signal."""
        self._listen(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End on every rank before a validation in which ranks may have different numbers of batches."""
        self._listen(trainer)
        if trainer.world_size > 1 and trainer.state.fn == "fit" and self._agree(trainer):
            raise SIGTERMException

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save at the last batch of an epoch; Lightning ends behind the epoch then, where a resume is not exact."""
        if trainer.world_size > 1 and self._agree(trainer):
            trainer._signal_connector.received_sigterm = True
        if trainer.received_sigterm and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save between two batches of an epoch."""
        between = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if isinstance(exception, SIGTERMException) and trainer.state.stage == RunningStage.TRAINING and between:
            self._save(trainer)

    def _listen(self, trainer: Trainer) -> None:
        """Take the place of Lightning's handler, until Lightning takes all handlers back at the end of the run."""
        if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
            return

        def remember(number: int, frame: Any) -> None:
            if self._told:  # by the scheduler, and by the process that started this one
                return
            self._told = True
            launcher: Any = trainer.strategy.launcher
            if launcher is not None:
                launcher.kill(number)  # the processes that Lightning itself has started
            if not trainer.training:  # nothing is to be saved, and nobody waits for this process without being told
                raise SIGTERMException

        signal.signal(signal.SIGTERM, remember)

    def _agree(self, trainer: Trainer) -> bool:
        """Return whether any process was told to end; all of them must ask."""
        return trainer.strategy.reduce_boolean_decision(self._told, all=False)

    def _save(self, trainer: Trainer) -> None:
        target = save_last(trainer)
        if target is not None:
            rank_zero_info(f"terminated: saved {target} at step {trainer.global_step}")


def save_last(trainer: Trainer) -> Path | None:
    """Write ``last.ckpt`` of the run's ``ModelCheckpoint`` and return it; None where it keeps none."""
    checkpoint: Any = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint) or not checkpoint.dirpath or not checkpoint.save_last:
        return None
    target = Path(checkpoint.dirpath) / f"{checkpoint.CHECKPOINT_NAME_LAST}{checkpoint.FILE_EXTENSION}"
    trainer.save_checkpoint(target, checkpoint.save_weights_only)
    return target

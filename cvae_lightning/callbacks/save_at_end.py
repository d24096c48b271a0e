"""Saves the model at the end of training, whatever the rhythm of checkpoints is."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from cvae_lightning.callbacks.save_at_termination import save_last


class SaveAtEnd(Callback):
    """Writes ``last.ckpt`` behind the last step of a training, where ``ModelCheckpoint`` has saved an earlier one.

    Lightning alone saves every ``every_n_train_steps``, and leaves what comes after the last multiple unsaved.

    A training that ends because of ``max_steps`` or ``max_epochs`` is saved behind its last batch, from where it goes
    on exactly if it is told to take more steps. What else ends it (``max_time``, early stopping) is known only when it
    is over: then the file holds the model of the last step, but the epoch that it was in counts as over.
    """

    def __init__(self) -> None:
        self._begun = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where the training begins or goes on: there a checkpoint is at hand."""
        self._begun = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save behind the last batch."""
        checkpoint = trainer.checkpoint_callback
        if not isinstance(checkpoint, ModelCheckpoint) or checkpoint.save_last == "link":  # a link is made anew later
            return
        every = checkpoint._every_n_train_steps  # 0: it saves where epochs end
        if every and trainer.global_step % every and self._is_last_batch(trainer) and not _is_trial(trainer):
            checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was not known to be the last batch."""
        checkpoint, step = trainer.checkpoint_callback, trainer.global_step
        if not isinstance(checkpoint, ModelCheckpoint):
            return
        if _is_trial(trainer):
            checkpoint.save_last = False  # or Lightning, which comes next, writes the trial over a trained model
        elif step not in (self._begun, checkpoint._last_global_step_saved):
            save_last(trainer)

    @staticmethod
    def _is_last_batch(trainer: Trainer) -> bool:
        if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
            return True
        is_last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        return is_last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def _is_trial(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]

"""Checkpoints saved when an epoch ends, which resume at the first batch of the next epoch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker


class EpochEnds(Callback):
    """Lets a run go on exactly from a checkpoint that ``ModelCheckpoint`` saved in ``on_train_epoch_end``.

    Lightning resumes there without starting its count of the epoch's batches anew: the next epoch would draw other
    seeds, and accumulate gradients over other batches, than in the run that was never stopped. It does resume exactly
    from a file saved at the last batch of an epoch, so the counts of the file are turned into those. From either, it
    does not count the next epoch as begun, and what it then saves at that epoch's last batch looks like an epoch that
    is over: the count is put right.
    """

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Count the epoch of this batch as begun."""
        progress = trainer.fit_loop.epoch_progress
        for count in (progress.total, progress.current):
            assert isinstance(count, _ProcessedTracker)
            count.ready = count.started = count.processed + 1

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Change the counts before the loops read them."""
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        epochs, batches = loops.get("epoch_progress"), loops.get("epoch_loop.batch_progress")
        if not epochs or not batches or not batches["is_last_batch"]:
            return
        total = epochs["total"]
        if not total["ready"] == total["started"] == total["processed"] == total["completed"] + 1:
            return
        if batches["total"]["completed"] != batches["total"]["processed"]:
            return
        for count in ("total", "current"):
            epochs[count]["processed"] -= 1
            batches[count]["completed"] -= 1
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # the last batch of an epoch always takes a step

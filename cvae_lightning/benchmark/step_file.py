"""Tells the benchmark which step a training has reached."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from cvae_lightning.atomic_write import write_text


class StepFile(Callback):
    """Writes the number of optimizer steps into a file, at most once in ``seconds``, and at the end of training.

    Args:
        path: the file; it is replaced as a whole.
        seconds: shortest time between two writes; each waits for the disk (about 12 ms on a local one).
    """

    def __init__(self, path: str, seconds: float = 5.0) -> None:
        self.path = Path(path)
        self.seconds = seconds
        self._written = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Write, unless the last time is too recent."""
        if trainer.is_global_zero and time.monotonic() - self._written >= self.seconds:
            self._write(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last step."""
        if trainer.is_global_zero:
            self._write(trainer.global_step)

    def _write(self, step: int) -> None:
        self._written = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk must not end a training for the sake of a display
            write_text(self.path, f"{step}\n")

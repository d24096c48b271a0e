"""Writes what ``predict`` returns to one JSONL file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info


class PredictionWriter(Callback):
    """Streams the rows of ``predict_step`` to a file per rank and merges them in the order of their ``index``.

    Nothing is kept in memory, and the target appears only when it is whole.

    Args:
        path: JSONL file to write; None = ``predictions.jsonl`` in ``trainer.default_root_dir``.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def target(self, trainer: Trainer) -> Path:
        """Return the file that is written in the end."""
        return Path(self.path) if self.path is not None else Path(trainer.default_root_dir) / "predictions.jsonl"

    def _part(self, trainer: Trainer, rank: int) -> Path:
        target = self.target(trainer)
        return target.with_name(f".{target.name}.{rank}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this rank's file."""
        part = self._part(trainer, trainer.global_rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        self._file = part.open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a batch."""
        if self._file is not None:
            self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in outputs or [])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the ranks' files, each sorted already, into the target."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
        lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines(keepends=True)]
        lines.sort(key=lambda line: json.loads(line).get("index", 0))
        merged = parts[0].with_suffix(".merged")
        merged.write_text("".join(lines), encoding="utf-8")
        os.replace(merged, self.target(trainer))
        for part in parts:
            part.unlink()
        rank_zero_info(f"{len(lines)} predictions written to {self.target(trainer)}")

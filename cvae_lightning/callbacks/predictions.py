"""Writes what ``predict`` returns to one JSONL file."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from cvae_lightning.atomic_write import replacing


class PredictionWriter(Callback):
    """Streams the rows of ``predict_step`` to a file per rank and merges them in the order of their ``index``.

    No row is kept in memory, the target appears only when it is whole, and a record that a distributed sampler gave to
    two ranks is written once.

    Args:
        path: JSONL file to write, on a disk that all ranks share; None = ``predictions.jsonl`` in
            ``trainer.default_root_dir``.
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
            self._file.flush()  # rows can be read as they come

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
        missing = [str(part) for part in parts if not part.exists()]
        if missing:
            raise ValueError(f"predictions of other processes are missing ({missing[0]}): give a path that they share")
        count = merge(parts, self.target(trainer))
        for part in parts:
            part.unlink()
        rank_zero_info(f"{count} predictions written to {self.target(trainer)}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the file of a prediction that was cut short; what it holds stays beside the target, hidden."""
        if self._file is not None:
            self._file.close()
            self._file = None


def merge(parts: Sequence[Path], target: Path) -> int:
    """Write the lines of JSONL files, sorted by ``index``, to another, and return their number.

    Only the places of the lines are held in memory. Lines without an index keep their order, at the end; of lines with
    the same index in several files those of the first file stay.
    """
    places: list[tuple[float, int, int]] = []  # index, file, offset
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(part.open("rb")) for part in parts]
        for number, file in enumerate(files):
            places += [(index, number, offset) for index, offset in _places(file)]
        places.sort()
        written, count = (math.inf, 0), 0
        with replacing(target, target.with_name(f".{target.name}.merged")) as out:
            for index, number, offset in places:
                if index != math.inf and written[0] == index and written[1] != number:
                    continue
                files[number].seek(offset)
                out.write(files[number].readline())
                written, count = (index, number), count + 1
    return count


def _places(file: IO[bytes]) -> Iterator[tuple[float, int]]:
    """Yield the index of every line, infinite where it has none, and where the line starts."""
    offset = 0
    for line in file:
        yield json.loads(line).get("index", math.inf), offset
        offset += len(line)

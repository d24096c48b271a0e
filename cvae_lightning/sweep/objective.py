"""What a trial is judged by: ends of validation curves or figures of the test, when it has ended and on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cvae_lightning.benchmark import records
from cvae_lightning.benchmark.history import read_history
from cvae_lightning.benchmark.plan import Cell

if TYPE_CHECKING:
    from optuna import Trial


def objective(cells: Sequence[Cell], keys: Sequence[str]) -> float | None:
    """Return the mean over the cells of a trial, or None if one of them failed or has no such figure.

    Args:
        cells: the cells of a trial; entangled models among them do not count.
        keys: the one figure, or the two of a ratio.
    """
    numbers = []
    for cell in (cell for cell in cells if cell.seed is not None):
        result = records.read_result(cell)
        if result is None or not records.finishes(result, cell):
            return None
        numbers.append(ratio([figure(result, key) for key in keys]))
    known = [number for number in numbers if number is not None]
    return fmean(known) if known and len(known) == len(numbers) else None


def check_keys_of(cells: Sequence[Cell], keys: Sequence[str]) -> None:
    """Raise if the summary of a finished cell has no such key: it is misspelt, and no other trial will have it.

    Raises:
        ValueError: naming the key and those that there are.
    """
    for cell in (cell for cell in cells if cell.seed is not None):
        metrics = (records.read_result(cell) or {}).get("metrics") or {}
        for key in keys:
            if metrics and not key.startswith("val/") and key not in metrics:
                known = sorted(name for name, value in metrics.items() if isinstance(value, int | float))
                raise ValueError(f"objective: summary.json of {cell.name} has no {key!r}; it has {', '.join(known)}")


def figure(result: Mapping[str, Any], key: str) -> float | None:
    """Return one part of the objective: the end of a validation curve, or a figure of the test."""
    if key.startswith("val/"):
        curve = (result.get("history") or {}).get(key)
        return float(curve[-1][1]) if curve else None
    value = (result.get("metrics") or {}).get(key)
    return float(value) if isinstance(value, int | float) else None


def ratio(parts: Sequence[float | None]) -> float | None:
    """Return the one number, or the quotient of two; None if it is not finite or a part is missing.

    Example:
        >>> ratio([3.0]), ratio([3.0, 2.0]), ratio([3.0, 0.0]), ratio([None])
        (3.0, 1.5, None, None)
    """
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or 0.0 in known[1:]:
        return None
    value = known[0] / math.prod(known[1:])
    return value if math.isfinite(value) else None


class Pruning:
    """Reports the validation curve of the cell that runs, and says when it is to end.

    Args:
        trial: the trial that it belongs to.
        keys: the one curve, or the two of a ratio.
    """

    def __init__(self, trial: Trial, keys: Sequence[str]) -> None:
        self.trial, self.keys = trial, keys
        self.said = ""
        self._reported: set[float] = set()

    def __call__(self, cell: Cell) -> str | None:
        """Return why the training of a cell is to end, or None."""
        history = read_history(cell.folder)[0]
        curves = [{step: value for step, value in history.get(key, [])} for key in self.keys]
        for step in sorted(set.intersection(*map(set, curves)) - self._reported):
            value = ratio([curve[step] for curve in curves])
            if value is not None:
                self.trial.report(value, int(step))
                self._reported.add(step)
                if self.trial.should_prune():
                    self.said = f"pruned at step {step + 1:.0f}: worse than the median of the trials before it"
                    return self.said
        return None

"""What the user sees while cells run: one line per event, and how long it will still take."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Protocol

from cvae_lightning.benchmark.plan import Cell


class Times(Protocol):
    """A cell that runs here."""

    cell: Cell

    @property
    def seconds(self) -> float:
        """Time spent on it so far, over all sittings."""

    @property
    def fraction(self) -> float:
        """Share of its training that is done, in [0, 1]."""


class Display:
    """Events line by line; the state in a line that is redrawn on a terminal, and printed once in a while elsewhere.

    Args:
        every: seconds between two states where the output is no terminal.
    """

    def __init__(self, every: float = 60.0) -> None:
        self.every = 1.0 if sys.stdout.isatty() else every
        self._shown = time.monotonic() if not sys.stdout.isatty() else 0.0
        self._width = 0

    def event(self, text: str) -> None:
        """Print one line."""
        self._erase()
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    def due(self) -> bool:
        """Return whether the state is to be shown again."""
        return time.monotonic() - self._shown >= self.every

    def state(self, text: str) -> None:
        """Show the state."""
        self._shown = time.monotonic()
        if not sys.stdout.isatty():
            print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
            return
        self._erase()
        text = text[: shutil.get_terminal_size().columns - 1]
        self._width = len(text)
        print(text, end="", flush=True)

    def _erase(self) -> None:
        if self._width:
            print("\r" + " " * self._width + "\r", end="")
            self._width = 0


def seconds_left(
    pending: Sequence[Cell], running: Sequence[Times], finished: Mapping[Cell, float], jobs: int
) -> float | None:
    """Estimate the time that all cells together still take, in seconds; None while nothing is known.

    A cell takes as long as finished ones of its task and recipe, else of its recipe, else of its task, else as the
    mean of all; a running cell of a kind that has not finished yet counts by the share of its training that is done.

    Args:
        pending: cells that nobody runs yet.
        running: cells that run here.
        finished: seconds of the cells that are done.
        jobs: cells that run at a time.
    """
    known: dict[Cell, float] = dict(finished)
    for one in running:
        if one.fraction > 0.05:
            known[one.cell] = max(one.seconds / one.fraction, one.seconds)

    def expected(cell: Cell) -> float | None:
        kinds = (
            lambda c: c.task == cell.task and c.recipe == cell.recipe,
            lambda c: c.recipe == cell.recipe,
            lambda c: c.task == cell.task and (c.seed is None) == (cell.seed is None),
            lambda c: (c.seed is None) == (cell.seed is None),
            lambda c: True,
        )
        for alike in kinds:
            times = [seconds for other, seconds in known.items() if alike(other)]
            if times:
                return fmean(times)
        return None

    if not known:
        return None
    total = sum(expected(cell) or 0.0 for cell in pending)
    total += sum(max(0.0, (known.get(one.cell) or expected(one.cell) or 0.0) - one.seconds) for one in running)
    return total / max(1, jobs)


def clock(seconds: float) -> str:
    """Return a duration as text.

    Example:
        >>> clock(42), clock(725), clock(7500)
        ('42 s', '12 min', '2 h 05 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"

"""Runs the cells: claims one, trains it, tests it, writes its result; whatever dies can be picked up by the next."""

from __future__ import annotations

import contextlib
import math
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from cvae_lightning.atomic_write import write_text
from cvae_lightning.benchmark import claims, records
from cvae_lightning.benchmark.child import PATIENCE, Child
from cvae_lightning.benchmark.claims import Claim
from cvae_lightning.benchmark.history import read_history
from cvae_lightning.benchmark.plan import Cell, located
from cvae_lightning.benchmark.progress import Display, clock, seconds_left
from cvae_lightning.benchmark.provenance import provenance
from cvae_lightning.benchmark.records import Progress

COMMAND = (sys.executable, "-m", "cvae_lightning.cli")
POLL = 0.25
SCAN = 2.0
"""Seconds between two looks at what other runners have done."""
WATCH = 10.0
"""Seconds between two looks of ``watch`` at a cell."""


@dataclass
class Running:
    """A cell that this process runs."""

    cell: Cell
    claim: Claim
    progress: Progress
    child: Child = field(init=False)
    stage: str = ""
    beaten: float = field(default_factory=time.monotonic)
    watched: float = field(default_factory=time.monotonic)
    before: float = 0.0

    @property
    def seconds(self) -> float:
        """Time spent on the cell, over all sittings."""
        return self.progress.fit_seconds + (self.progress.test_seconds if self.stage == "test" else 0.0)

    @property
    def fraction(self) -> float:
        """Share of the training that is done."""
        if self.stage == "test":
            return 1.0
        return min(1.0, records.step(self.cell) / self.cell.max_steps) if self.cell.max_steps else 0.0

    def start(self, stage: str, threads: int) -> None:
        """Start a training, where it was broken off if it was, or the test."""
        cell, self.stage = self.cell, stage
        words = [*COMMAND, stage, "--config", str(cell.folder / f"{stage}.yaml")]
        if stage == "test" or cell.checkpoint.exists():
            words += ["--ckpt_path", str(cell.checkpoint)]
        if stage == "test":
            (cell.folder / "summary.json").unlink(missing_ok=True)
        self.before = self.progress.fit_seconds if stage == "fit" else 0.0
        self.child = Child(words, cell.folder / "log.txt", threads)

    def clock(self) -> None:
        """Add the time that has passed to the progress."""
        setattr(self.progress, f"{self.stage}_seconds", round(self.before + self.child.seconds, 1))


class Runner:
    """Runs what is not finished, next to other runners of the same folder.

    A cell that failed before this runner started is tried once more; what fails while it runs is left to the next. A
    result of another configuration that was there at the start is run anew; one that another runner leaves meanwhile is
    kept, and its cell counts as changed.

    Args:
        cells: the cells, entangled models first.
        jobs: cells at a time.
        threads: threads of each.
        finished: called after every cell that was done or failed.
        display: where events go.
        watch: looks at a cell in training from time to time; a text that it returns ends the cell, as its error.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        jobs: int,
        threads: int,
        finished: Callable[[], object] = lambda: None,
        display: Display | None = None,
        watch: Callable[[Cell], str | None] | None = None,
    ) -> None:
        self.cells = list(cells)
        self.jobs, self.threads = jobs, threads
        self.finished = finished
        self.display = display or Display()
        self.watch = watch
        self.provenance = provenance(threads)
        self.running: list[Running] = []
        self.stopped_by: signal.Signals | None = None
        self._results: dict[Cell, dict[str, Any]] = {}
        self._old_failures = {c: r["attempt"] for c in cells if (r := self._result(c)) and r["status"] == "failed"}
        self._to_replace = {c: r["hash"] for c in cells if (r := self._result(c)) and r["status"] == "done"}
        self._changed: set[Cell] = set()
        self._open: list[Cell] = []
        self._scanned = -math.inf

    def run(self) -> int:
        """Run until nothing is left, and return the exit code: 0, 1 if a cell failed, 128 + n after signal n."""
        with self._signals():
            try:
                while self.stopped_by is None and self._turn():
                    time.sleep(POLL)
            finally:
                self._stop()
        if self.stopped_by is not None:
            self.display.event("stopped; the same command goes on where this one was")
            return 128 + self.stopped_by
        return int(any(not self._done(cell) for cell in self.cells))

    def _turn(self) -> bool:
        """Look after what runs, start what can be started; return whether anything is left to wait for."""
        for one in list(self.running):
            self._look_after(one)
        if time.monotonic() - self._scanned >= SCAN:  # reading every result more often would tire a network disk
            self._scanned = time.monotonic()
            self._open = [cell for cell in self.cells if not self._settled(cell)]
            mine = {one.cell for one in self.running}
            for cell in self._open:
                if len(self.running) >= self.jobs:
                    break
                if cell not in mine and (cell.entangled is None or self._done(cell.entangled)):
                    self._try(cell)
        if self.display.due():
            self._show()
        return bool(self.running or self._open)

    def _settled(self, cell: Cell) -> bool:
        """Return whether nothing is left to do: done, failed in this round, changed, or without its entangled model."""
        if cell in self._changed:
            return True
        if cell.entangled is not None and not self._done(cell.entangled) and self._settled(cell.entangled):
            return True
        result = self._result(cell)
        if result is not None and result["status"] == "failed":
            return bool(result["attempt"] != self._old_failures.get(cell))
        return records.finishes(result, cell)

    def _result(self, cell: Cell) -> dict[str, Any] | None:
        """Read the result of a cell; one that is done stays so, and is read once."""
        if cell in self._results:
            return self._results[cell]
        result = records.read_result(cell)
        if result is not None and records.finishes(result, cell):
            self._results[cell] = result
        return result

    def _done(self, cell: Cell) -> bool:
        return records.finishes(self._result(cell), cell)

    def _try(self, cell: Cell) -> None:
        claim = Claim.take(cell.folder)
        if claim is None:
            return
        if self._settled(cell):  # finished by another runner a moment ago
            claim.release()
            return
        result = self._result(cell)
        if result is not None and result["status"] == "done" and result["hash"] != self._to_replace.get(cell):
            claim.release()
            self._changed.add(cell)
            self.display.event(
                f"changed {cell.name}: another runner has finished it with another configuration; its result is kept "
                "(--rerun-changed runs it anew)"
            )
            return
        progress = Progress.read(cell)
        if progress is not None and progress.hash != cell.fit_hash:
            if (result is None or result["status"] != "done") and cell.checkpoint.exists():
                self.display.event(
                    f"cleared {cell.name}: a training of another configuration was there, at step {records.step(cell)}"
                )
            records.clear(cell)
            progress = None
        progress = progress or Progress(cell.fit_hash)
        progress.sittings += 1
        progress.write(cell)
        for stage in ("fit", "test"):
            text = yaml.safe_dump(located(cell, stage == "test"), sort_keys=False)
            write_text(cell.folder / f"{stage}.yaml", text)
        one = Running(cell, claim, progress)
        goes_on = f", goes on at step {records.step(cell)}" if cell.checkpoint.exists() else ""
        goes_on = ", is trained already" if progress.fitted else goes_on
        self.display.event(f"start   {cell.name}{goes_on}")
        one.start("test" if progress.fitted else "fit", self.threads)
        self.running.append(one)

    def _look_after(self, one: Running) -> None:
        code = one.child.poll()
        if time.monotonic() - one.beaten >= claims.BEAT:
            one.beaten = time.monotonic()
            if not one.claim.beat():
                one.child.kill()
                self.running.remove(one)
                self._scanned = -math.inf
                self.display.event(f"lost    {one.cell.name}: another runner has taken it over")
                return
            one.clock()
            one.progress.write(one.cell)
        if code is None:
            self._watch(one)
            return
        one.clock()
        if code == 0 and one.stage == "fit":
            one.progress.fitted = True
            one.progress.write(one.cell)
            if one.cell.checkpoint.exists():
                one.start("test", self.threads)
                return
            self._finish(one, f"training left no checkpoint {one.cell.checkpoint}")
        elif code != 0:
            self._finish(one, one.child.error())
        elif not (one.cell.folder / "summary.json").exists():
            self._finish(one, "the test left no summary.json")
        else:
            self._finish(one, None)

    def _watch(self, one: Running) -> None:
        if self.watch is None or one.stage != "fit" or time.monotonic() - one.watched < WATCH:
            return
        reason = self.watch(one.cell)
        one.watched = time.monotonic()
        if reason is not None:
            one.child.kill()
            one.clock()
            self._finish(one, reason, "ended ")

    def _finish(self, one: Running, error: str | None, word: str = "FAILED") -> None:
        cell, progress = one.cell, one.progress
        progress.write(cell)
        result: dict[str, Any] = {
            "task": cell.task,
            "recipe": cell.recipe,
            "group": cell.group,
            "seed": cell.seed,
            "status": "done" if error is None else "failed",
            "hash": cell.hash,
        }
        if error is None:
            result["metrics"] = records.read_json(cell.folder / "summary.json")
            result["history"], result["loss_fractions"] = read_history(cell.folder)
        else:
            result |= {"error": f"{one.stage}: {error}", "attempt": secrets.token_hex(4)}
        result |= {name: getattr(progress, name) for name in ("fit_seconds", "test_seconds", "sittings")}
        result |= {**self.provenance, "config": cell.config, "test_config": cell.test_config}
        records.write_result(cell, result)
        one.claim.release()
        self.running.remove(one)
        self._scanned = -math.inf  # a place is free
        taken = clock(progress.fit_seconds + progress.test_seconds)
        if error is None:
            self.display.event(f"done    {cell.name} in {taken}")
        else:
            self.display.event(
                f"{word}  {cell.name} after {taken}: {error.splitlines()[0]} (see {cell.folder}/log.txt)"
            )
        self.finished()

    def _show(self) -> None:
        mine = {one.cell for one in self.running}
        others = [cell for cell in self._open if cell not in mine and claims.is_claimed(cell.folder)]
        pending = [cell for cell in self._open if cell not in mine and cell not in others]
        done = {c: r["fit_seconds"] + r["test_seconds"] for c in self.cells if (r := self._result(c)) and self._done(c)}
        parts = [f"{len(done)}/{len(self.cells)} cells"]
        for one in self.running:
            one.clock()
            steps = (
                f" {records.step(one.cell)}/{one.cell.max_steps}" if one.cell.max_steps and one.stage == "fit" else ""
            )
            parts.append(f"{one.cell.name} {one.stage}{steps} ({clock(one.seconds)})")
        if others:
            parts.append(f"{len(others)} with other runners")
        left = seconds_left([*pending, *others], self.running, done, self.jobs)
        parts.append("time left unknown yet" if left is None else f"about {clock(left)} left")
        self.display.state(" | ".join(parts))

    def _stop(self) -> None:
        """End the children and give their cells up; they go on from their last checkpoints."""
        for one in self.running:
            one.child.terminate()
        deadline = time.monotonic() + PATIENCE
        for one in self.running:
            one.child.kill(deadline - time.monotonic())
            one.clock()
            one.progress.write(one.cell)
            one.claim.release()
        self.running = []

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let Ctrl-C, SIGTERM and a closed terminal end the loop instead of the process."""

        def remember(number: int, frame: Any) -> None:
            self.stopped_by = signal.Signals(number)

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, remember) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

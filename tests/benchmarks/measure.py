"""Side-by-side timing, peak memory in processes of their own, and tables of ratios with their gates."""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

RESULTS = Path(__file__).parent / "results"
M_MMAP_THRESHOLD = -3  # of malloc.h


def options(description: str) -> argparse.Namespace:
    """Parse ``--quick`` (small sizes, one repetition, no verdict), ``--write`` and ``--repeat``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes: only shows that the script runs")
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULTS}")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions; minima are compared")
    parser.add_argument("--only", default="", help="only rows whose name begins with this")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return given


def clock() -> float:
    """Seconds: CPU time of this process where it has one thread, so that others on the machine disturb less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(sides: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Return the least time of each side in seconds; sides take turns, so that a noisy moment strikes all of them."""
    best = dict.fromkeys(sides, float("inf"))
    for side in sides.values():
        side()  # warm-up
    for _ in range(repeat):
        for name, side in sides.items():
            gc.collect()
            start = clock()
            side()
            best[name] = min(best[name], clock() - start)
    return best


def extra_megabytes(build: Callable[[], Callable[[], Any]]) -> float:
    """Return by how much running a side raises this process's resident memory above its state once built.

    The kernel's high-water mark is reset in between. The side runs in a forked child, so nothing is left behind. There
    every block of 64 KiB or more is handed back to the kernel as soon as it is freed: what is measured is memory in
    use. Otherwise glibc keeps what was freed, and finds little of it again for aligned blocks (its bug 14581): the same
    step was seen with 74, 90 and 244 MB, which says where glibc put things and nothing of what the step needs.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, 64 << 10)
            side = build()
            gc.collect()
            libc.malloc_trim(0)  # give back what was freed, or it would be used again unseen
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            side()
            os.write(write_end, f"{(_status('VmHWM') - before) / 1024:.3f}".encode())
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end) as pipe:
        return float(pipe.read())


def _status(key: str) -> int:
    """Kibibytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Figure(NamedTuple):
    """One measured ratio.

    Args:
        name: what was measured.
        value: the ratio.
        gate: least value that passes (largest, if ``at_most``); None = for information.
        aim: value to be proud of.
        note: the numbers behind the ratio.
    """

    name: str
    value: float
    gate: float | None = None
    aim: float | None = None
    note: str = ""
    at_most: bool = False

    @property
    def passed(self) -> bool:
        """Whether the gate is kept."""
        return self.gate is None or (self.value <= self.gate if self.at_most else self.value >= self.gate)


def report(title: str, figures: Sequence[Figure], given: argparse.Namespace) -> None:
    """Print a Markdown table, write it if asked to, and exit with 1 if a gate is broken (never with --quick)."""
    command = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} python {' '.join(sys.argv)}"
    lines = [f"### {title}", "", f"`{command}`", "", "| figure | ratio | gate | aim | passed | measured |"]
    lines.append("|---|---|---|---|---|---|")
    for f in figures:
        sign = "≤" if f.at_most else "≥"
        gate, aim = (" " if value is None else f"{sign} {value:g}" for value in (f.gate, f.aim))
        passed = "" if f.gate is None else "yes" if f.passed else "**no**"
        lines.append(f"| {f.name} | {f.value:.3g} | {gate} | {aim} | {passed} | {f.note} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if given.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{Path(sys.argv[0]).stem}.md").write_text(text)
    if not given.quick and not all(f.passed for f in figures):
        raise SystemExit(1)

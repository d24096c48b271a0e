"""One command of a cell as a child process that dies with the runner."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cvae_lightning.launch import alone

PATIENCE = 10.0
"""Seconds that a child has to end after SIGTERM."""
TAIL = 15


class Child:
    """A process in a group of its own, so that Ctrl-C reaches the runner alone, which then ends its children.

    It knows nothing of the launch (SLURM, torchrun) that the runner belongs to: each cell is one process.

    Args:
        words: the command.
        log: file that its output is appended to.
        threads: threads that torch may use.
    """

    def __init__(self, words: Sequence[str], log: Path, threads: int) -> None:
        count = str(threads)
        environment = {
            **alone(os.environ),
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",  # so that the log of a killed child is whole
        }
        self.started = time.monotonic()
        self.log = log
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(words)}\n".encode())
            output.flush()
            self._start = output.tell()
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask the whole group to end."""
        self._signal(signal.SIGTERM)

    def kill(self, patience: float = 0.0) -> None:
        """End the whole group, after waiting ``patience`` seconds for it to end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, patience))
        self._signal(signal.SIGKILL)
        self._process.wait()

    def error(self) -> str:
        """Return what is known of a failure: the error message in the output, else how it ended and its last lines.

        The first line says it all; of the last lines it has the very last one, and those before follow.
        """
        with self.log.open("rb") as file:
            file.seek(self._start)
            lines = file.read().decode(errors="replace").rstrip().splitlines()
        said = [line for line in lines if line.startswith("cvae-lightning: error: ")]
        if said:
            return said[-1].removeprefix("cvae-lightning: error: ")
        code = self._process.poll()
        ending = f"ended with exit code {code}" if code is None or code >= 0 else f"killed by {_signal_name(-code)}"
        return "\n".join([f"{ending}: {lines[-1]}" if lines else ending, *lines[-TAIL:-1]])

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"
    return f"{name} (out of memory?)" if number == signal.SIGKILL else name


def end_with_parent() -> Callable[[], None] | None:
    """Return what makes Linux kill the child when its parent dies without a word (kill -9); None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

    def prepare() -> None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before this line
            os._exit(1)

    return prepare

"""The launch that this process belongs to, as torchrun, SLURM or Lightning's launcher tell it by the environment."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 2.0
"""Seconds in which the other processes meet the error that one of them has shown."""

LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "MASTER_")
"""Beginnings of the names of variables by which a launcher tells a process its place."""
PLACES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which a command is started by itself, whatever launch the given one belongs to.

    Lightning would take a child for the process of its parent's rank, and wait for others that nobody starts.

    Example:
        >>> alone({"PATH": "/bin", "RANK": "1", "SLURM_NTASKS": "4", "MASTER_PORT": "29500"})
        {'PATH': '/bin'}
    """
    return {name: value for name, value in environment.items() if not name.startswith(LAUNCHERS) and name not in PLACES}


def world_size() -> int:
    """Return the number of processes of the launch; 1 where this one was started alone."""
    return max(int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "SLURM_NTASKS"))


@contextmanager
def said_once(text: str) -> Iterator[bool]:
    """Yield whether ``text`` is to be said: False where another process of this launch and machine has just said it.

    The first to come leaves an empty file in the temporary folder for as long as the others may take, and removes it.
    """
    if world_size() == 1:
        yield True
        return
    alone = "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_PROCID" not in os.environ
    parent = os.getpid() if alone and os.environ.get("LOCAL_RANK", "0") == "0" else os.getppid()
    digest = hashlib.blake2b(repr((parent, text)).encode(errors="replace"), digest_size=8).hexdigest()
    mark = Path(tempfile.gettempdir()) / f"cvae_lightning-{digest}"
    try:
        mark.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        yield _is_stale(mark)
        time.sleep(PATIENCE)  # Lightning kills the process that it was started in, once one that it has started ends
        return
    except OSError:
        yield True
        return
    try:
        yield True
    finally:
        time.sleep(PATIENCE)
        mark.unlink(missing_ok=True)


def _is_stale(mark: Path) -> bool:
    """Return whether a mark was left behind by a process that was killed."""
    try:
        return time.time() - mark.stat().st_mtime > 10 * PATIENCE
    except OSError:
        return False  # removed this moment

"""Who runs which cell: claims in a folder that several processes and machines share."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import tempfile
from pathlib import Path

BEAT = 10.0
"""Seconds between two signs of life."""
STALE_AFTER = 120.0
"""Seconds without a sign of life after which a claim counts for nothing."""
DEAD_AFTER = 30.0
"""The same where its process is known to be gone."""


class Claim:
    """The right of one process to run a cell.

    A claim is a file ``claim.N``, created in a way that lets one process win (O_EXCL), and touched while its owner
    lives. A stale claim is not removed but outbid: by ``claim.N+1``, which again one process wins. An owner that was
    only asleep sees the higher number and stops. So two takers never both win, and no moment of dying leaves the cell
    locked for good.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def take(cls, folder: Path) -> Claim | None:
        """Return the claim, or None if another process has a live one.

        Args:
            folder: the cell's folder; made if it does not exist.
        """
        folder.mkdir(parents=True, exist_ok=True)
        held = _claims(folder)
        if held and _alive(held[-1]):
            return None
        path = folder / f"claim.{_number(held[-1]) + 1 if held else 0}"
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return None
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(owner, file)
        # whoever looked long ago may come to another number: then all of them step back
        if any(_alive(other) for other in _claims(folder) if other != path):
            path.unlink(missing_ok=True)
            return None
        return cls(path)

    def beat(self) -> bool:
        """Give a sign of life; return whether the claim is still this process's."""
        try:
            os.utime(self.path)
        except FileNotFoundError:
            return False
        held = _claims(self.path.parent)
        return bool(held) and held[-1] == self.path

    def release(self) -> None:
        """Give the claim up; claims that it outbid go first, so that none of them ever counts again."""
        for path in _claims(self.path.parent):
            if _number(path) < _number(self.path):
                path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def is_claimed(folder: Path) -> bool:
    """Return whether a process that gives signs of life runs the cell of this folder."""
    held = _claims(folder)
    return bool(held) and _alive(held[-1])


def _claims(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.glob("claim.*") if re.fullmatch(r"claim\.\d+", path.name)), key=_number)


def _number(path: Path) -> int:
    return int(path.suffix[1:])


def _alive(path: Path) -> bool:
    """Return whether the claim's owner gave a sign of life lately, by the clock of the file system that holds it."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".clock-") as clock:
            silence = os.stat(clock.name).st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return False
    return silence < (DEAD_AFTER if _owner_is_gone(path) else STALE_AFTER)


def _owner_is_gone(path: Path) -> bool:
    """Return whether the owner ran on this host and does so no more (containers may share a name: hence DEAD_AFTER)."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        owner = json.loads(path.read_text(encoding="utf-8"))
        if owner["host"] == socket.gethostname():
            try:
                os.kill(int(owner["pid"]), 0)
            except ProcessLookupError:
                return True
    return False

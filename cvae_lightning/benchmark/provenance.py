"""With what a number was measured: versions, commit and size of the machine, nothing that names a host."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("cvae-lightning", "torch", "lightning", "transformers")


def provenance(threads: int) -> dict[str, Any]:
    """Return versions, git commit of the package (None outside of a clone), number of CPUs and threads of a cell."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"versions": versions, "commit": commit(), "cpus": _cpus(), "threads": threads}


def commit() -> str | None:
    """Return the commit of the clone that holds this file, with ``-dirty`` where something is changed."""
    folder = Path(__file__).resolve().parent
    tracked = _git(folder, "ls-files", "--error-unmatch", str(folder.parent / "cli.py"))
    return None if tracked is None else _git(folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

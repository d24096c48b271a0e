"""What the files that a data module reads hold, as hashes: a name says nothing about what has become of its file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any


def file_contents(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of the content of every local file or folder that an argument named ``*_path`` gives.

    Names of data sets on a hub, and what is not there, are left out.

    Args:
        arguments: the ``init_args`` of a data module.
    """
    found = {}
    for name, value in arguments.items():
        if str(name).endswith("_path") and isinstance(value, str):
            path = Path(value) if Path(value).exists() else Path(value.partition("#")[0])  # FOLDER#SPLIT
            if value and path.exists():
                found[str(name)] = content_of(path)
    return found


def content_of(path: Path) -> str:
    """Return a hash of a file, or of the names and contents of all files of a folder."""
    digest = hashlib.blake2b(digest_size=8)
    files = sorted(inner for inner in path.rglob("*") if inner.is_file()) if path.is_dir() else [path]
    for file in files:
        state = file.stat()
        digest.update(f"{file.relative_to(path).as_posix()} {_hash(file, state.st_mtime_ns, state.st_size)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=1024)  # a benchmark asks for the same files once for every cell
def _hash(file: Path, modified: int, size: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

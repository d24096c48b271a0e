"""Files that hold either their old or their new content, whole, whenever the process dies or the disk is full."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    """Open ``temporary``, in the same folder, and give it the name ``path`` when all is written and on the disk.

    After an error ``path`` is as it was and ``temporary`` is gone; after a kill ``temporary`` is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the rename itself is durable where the system lets a folder be synced
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Replace a small text file, whoever writes the same file at the same time.

    Raises:
        OSError: if it cannot be written; the message names the file, and an old one is unchanged.
    """
    path, content = Path(path), text.encode()
    try:
        with replacing(path, path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")) as file:
            file.write(content)
    except OSError as error:
        kept = "; the old one is unchanged" if path.exists() else ""
        raise OSError(f"cannot write {path}: {error.strerror or error}{kept}") from error


def write_json(path: str | Path, content: Any) -> None:
    """Replace a small JSON file.

    Raises:
        ValueError: if a number is not finite: JSON has no word for it.
        OSError: as for :func:`write_text`.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

"""Checkpoint files that are either the old one or the new one, whole, whenever the process dies."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the target folder, syncs it and renames it; reads tensors and plain data only.

    Lightning's own writer is atomic only where ``$TMPDIR`` lies on the target's filesystem. A kill leaves at most one
    hidden ``.<name>.tmp`` beside the intact old file; the next save overwrites it. Remote paths (``s3://``) go through
    Lightning's writer.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replace the file at ``path``, or leave it as it was.

        Raises:
            OSError: if the file cannot be written, for instance on a full disk.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            reason = _disk_error(error)
            if reason is None:
                raise
            kept = "; the file of the last save is unchanged" if target.exists() else ""
            raise OSError(f"cannot write checkpoint {target}: {reason}{kept}") from error
        _sync_folder(target.parent)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; ``weights_only`` is always True, whatever is asked for.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, or holds anything but tensors and plain data.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
            if foreign:
                why = f"it holds {foreign.group(1)}; only tensors and plain data are ever loaded"
            else:
                why = "it is truncated, or not a checkpoint"
            raise ValueError(f"cannot read checkpoint {path}: {why}") from error


def _disk_error(error: BaseException) -> str | None:
    """Return why writing failed, or None if the fault is not the disk's (torch may wrap an OSError in another)."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

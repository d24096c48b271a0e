"""Checkpoint files that are either the old one or the new one, whole, whenever the process dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cvae_lightning.atomic_write import replacing
from cvae_lightning.trust import read_plain


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
            with replacing(target, temporary) as file:
                torch.save(checkpoint, file)
        except BaseException as error:
            reason = _disk_error(error)
            if reason is None:
                raise
            kept = ""
            if target.exists():
                kept = "; the file of the last save is unchanged"
            elif others := sorted(path.name for path in target.parent.glob("*.ckpt")):
                kept = f"; {', '.join(others[:3])}, saved before, {'is' if len(others) == 1 else 'are'} unchanged"
            raise OSError(f"cannot write checkpoint {target}: {reason}{kept}") from error

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
        read = super().load_checkpoint
        return read_plain(lambda: read(path, map_location, weights_only=True), path)


def _disk_error(error: BaseException) -> str | None:
    """Return why writing failed, or None if the fault is not the disk's (torch may wrap an OSError in another)."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return None

"""Token costs of a frozen model, computed once per record and kept on disk.

A cache is a folder of files that only grow, one for each process that wrote, so that no two writers share a file::

    header  <magic 8 bytes> <fingerprint 24 bytes>
    row     <record index i64> <number of tokens i32> <CRC-32 of the rest of the row u32> <nats f32 ...>

A row is written by a single call. What a killed process left half-written ends the file for every reader. Files are
memory-mapped, and records may come in any order and number, so nothing has to be known or read in advance.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

MAGIC = b"cvae-nll"
HEADER = struct.Struct("<8s24s")
ROW = struct.Struct("<qiI")


class BaselineCache:
    """The token costs of one split under one reference.

    Args:
        folder: where the files are; made when the first row is written.
        fingerprint: of everything that the numbers depend on; files with another one are left out of account.
        num_records: number of records of the split; rows are keyed by their index.
        rank: rank of this process, for the name of its file.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str, num_records: int, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.rank = rank
        self.computed = 0
        """Batches that had to be computed."""
        self._arguments = (self.folder, fingerprint, num_records, rank)
        self._header = HEADER.pack(MAGIC, hashlib.blake2b(fingerprint.encode(), digest_size=24).digest())
        self._file = np.full(num_records, -1, dtype=np.int32)  # which file holds a record's row, and where
        self._start = np.zeros(num_records, dtype=np.int64)
        self._paths: list[Path] = []
        self._ends: list[int] = []  # how far each file has been read
        self._maps: dict[int, mmap.mmap] = {}
        self._own: int | None = None
        self.refresh()
        for path, end in zip(self._paths, self._ends, strict=True):
            if 0 < end < path.stat().st_size:
                rank_zero_warn(f"{path} breaks off at byte {end}: what it lacks is computed again")

    def rows(self, index: Tensor, mask: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Return the costs of a batch; ``compute`` is called if some row is not known.

        All of a batch is then computed, so that a row has the value it would have had without an earlier, interrupted
        run; rows that are known keep theirs.

        Args:
            index: [B] record indices.
            mask: [B, T] True at supervised tokens, which come first.
            compute: returns [B, T] nats.

        Returns:
            [B, T] fp32 on the device of ``mask``, 0 where masked.
        """
        indices, lengths = index.tolist(), mask.sum(-1).tolist()
        known = [self._read(i, size) for i, size in zip(indices, lengths, strict=True)]
        values = torch.zeros(mask.shape)
        fresh: dict[int, np.ndarray[Any, Any]] = {}
        if any(row is None for row in known):
            self.computed += 1
            values = compute().float().cpu() * mask.cpu()
            array = values.numpy()
            fresh = {
                i: array[b, : lengths[b]] for b, (i, row) in enumerate(zip(indices, known, strict=True)) if row is None
            }
        for b, row in enumerate(known):
            if row is not None:
                values[b, : lengths[b]] = torch.from_numpy(row)
        if fresh:
            self._write(fresh)
        return values.to(mask.device)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies open the folder anew: maps and files belong to one process."""
        return type(self), self._arguments

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Return those records that no process has written yet."""
        self.refresh()
        return [i for i in indices if self._file[i] < 0]

    def refresh(self) -> None:
        """Read what other processes have written since."""
        for path in sorted(self.folder.glob("*.rows")):
            if path not in self._paths:
                self._paths.append(path)
                self._ends.append(0)
        for number, path in enumerate(self._paths):
            if number != self._own and self._ends[number] >= 0 and path.stat().st_size > self._ends[number]:
                self._scan(number)

    def _scan(self, number: int) -> None:
        """Take up the rows of a file from where it was left; an unknown header or a torn row ends it."""
        content = self._map(number)
        position = self._ends[number]
        if position == 0:
            if content[: HEADER.size] != self._header:
                self._ends[number] = -1
                return
            position = HEADER.size
        while position + ROW.size <= len(content):
            index, size, checksum = ROW.unpack_from(content, position)
            end = position + ROW.size + 4 * size
            whole = size > 0 and 0 <= index < len(self._file) and end <= len(content)
            if not whole or _checksum(index, content[position + ROW.size : end]) != checksum:
                break
            self._file[index], self._start[index] = number, position
            position = end
        self._ends[number] = position

    def _read(self, index: int, size: int) -> np.ndarray[Any, Any] | None:
        number, start = int(self._file[index]), int(self._start[index])
        if number < 0:
            return None
        content = self._maps.get(number)
        if content is None or start + ROW.size + 4 * size > len(content):
            content = self._map(number)
        _, stored, _ = ROW.unpack_from(content, start)
        if stored != size:
            rank_zero_warn(
                f"{self.folder} has {stored} tokens for record {index}, the data {size}: it is computed again"
            )
            self._file[index] = -1
            return None
        return np.frombuffer(content, np.float32, size, start + ROW.size).copy()

    def _map(self, number: int) -> mmap.mmap:
        with self._paths[number].open("rb") as file:
            self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[number]

    def _write(self, rows: dict[int, np.ndarray[Any, Any]]) -> None:
        try:
            if self._own is None:
                self._own = self._create()
            self._append(self._own, rows)
        except OSError as error:
            rank_zero_warn(f"the baseline NLL cannot be cached in {self.folder}: {error}")

    def _create(self) -> int:
        """Create a file of this process alone, and return its number."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for attempt in itertools.count():
            path = self.folder / f"{self.rank}-{attempt}.rows"
            with contextlib.suppress(FileExistsError), path.open("xb") as file:
                file.write(self._header)
                break
        self._paths.append(path)
        self._ends.append(HEADER.size)
        return len(self._paths) - 1

    def _append(self, number: int, rows: dict[int, np.ndarray[Any, Any]]) -> None:
        parts: list[bytes] = []
        starts: dict[int, int] = {}
        position = self._ends[number]
        for index, row in rows.items():
            values = np.ascontiguousarray(row, np.float32).tobytes()
            parts.append(ROW.pack(index, len(row), _checksum(index, values)) + values)
            starts[index] = position
            position += len(parts[-1])
        with self._paths[number].open("ab", buffering=0) as file:
            written = file.write(b"".join(parts))
        if written != position - self._ends[number]:
            self._own = None  # the disk was full: what comes next goes to another file
            raise OSError("no space left")
        self._ends[number] = position
        for index, start in starts.items():
            self._file[index], self._start[index] = number, start


def _checksum(index: int, values: bytes) -> int:
    return zlib.crc32(values, zlib.crc32(struct.pack("<qi", index, len(values) // 4)))


def model_fingerprint(lm: Any) -> str:
    """Return a hash of a model's config and weights, the same in every process and with any number of threads."""
    digest = hashlib.blake2b(repr(sorted(lm.config.to_dict().items(), key=str)).encode(), digest_size=16)
    _add_weights(digest, lm)
    return digest.hexdigest()


def weights_fingerprint(lm: Any) -> str:
    """Return a hash of a model's weights alone, which knows nothing of where they lie or what has read them."""
    digest = hashlib.blake2b(digest_size=16)
    _add_weights(digest, lm)
    return digest.hexdigest()


def _add_weights(digest: Any, lm: Any) -> None:
    """Add, of every tensor, the sum of all its bytes as integers, and up to 4096 of its elements."""
    for name, value in lm.state_dict().items():
        raw = value.detach().contiguous().view(torch.uint8 if value.element_size() % 4 else torch.int32).flatten()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}{int(raw.sum(dtype=torch.int64))}".encode())
        digest.update(raw[:: max(1, raw.numel() // 4096)].cpu().numpy().tobytes())

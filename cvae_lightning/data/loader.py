"""A training loader that stops in the middle of an epoch and resumes there, batch for batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler


def world() -> tuple[int, int]:
    """Return (number of processes, rank of this one); (1, 0) outside of ``torch.distributed``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0


def hash_int(text: str) -> int:
    """Return a non-negative 63-bit integer that is a pure function of ``text``, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class EpochSampler(DistributedSampler[Any]):
    """Shuffles by (seed, epoch) alone and gives every rank the same number of full batches.

    The shuffled records are cut into global batches of ``batch_size * num_replicas``, the remainder is left out, and
    rank r takes every ``num_replicas``-th record of each, from r on. Being a ``DistributedSampler``, it is neither
    replaced nor reshuffled by Lightning, which calls ``set_epoch``.

    Args:
        dataset: records, of known length.
        batch_size: records per rank and batch.
        seed: seed of the order.
        lengths: length of each record; batches then hold records of similar length: within pools of ``POOL`` batches
            records are sorted by length, and the batches are shuffled. None = plain shuffling.
        num_replicas: number of processes; None = that of ``torch.distributed``.
        rank: rank of this process; None = that of ``torch.distributed``.

    Raises:
        ValueError: if there are fewer records than ``batch_size * num_replicas``.
    """

    POOL = 50

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        size, here = world()
        super().__init__(
            dataset,  # type: ignore[arg-type]
            num_replicas=size if num_replicas is None else num_replicas,
            rank=here if rank is None else rank,
            seed=seed,
            drop_last=True,
        )
        self.global_batch = batch_size * self.num_replicas
        self.num_batches = len(dataset) // self.global_batch
        if self.num_batches == 0:
            raise ValueError(
                f"{len(dataset)} training records do not fill one batch of {batch_size} on each of "
                f"{self.num_replicas} processes: lower batch_size or the number of devices, or give more records"
            )
        self.num_samples = self.num_batches * batch_size
        self.total_size = self.num_batches * self.global_batch
        self.batch_size = batch_size
        self.lengths = lengths
        self.start = 0
        """Batches that the next iteration leaves out; reset by it."""

    def signature(self) -> list[int]:
        """Return what fixes the order besides the epoch; positions of equal signatures are comparable."""
        return [len(self.dataset), self.batch_size, self.num_replicas, self.seed, int(self.lengths is not None)]  # type: ignore[arg-type]

    def global_order(self) -> list[int]:
        """Return the order of this epoch over all ranks."""
        generator = torch.Generator().manual_seed(hash_int(f"order/{self.seed}/{self.epoch}"))
        order = torch.randperm(len(self.dataset), generator=generator).tolist()[: self.total_size]  # type: ignore[arg-type]
        if self.lengths is None:
            return order
        step, pool = self.global_batch, self.POOL * self.global_batch
        lengths = self.lengths
        pools = (sorted(order[i : i + pool], key=lambda record: lengths[record]) for i in range(0, len(order), pool))
        order = [record for records in pools for record in records]
        shuffled = torch.randperm(self.num_batches, generator=generator).tolist()
        return [record for batch in shuffled for record in order[batch * step : (batch + 1) * step]]

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's records, ``start`` batches left out."""
        start, self.start = self.start, 0
        yield from self.global_order()[self.rank :: self.num_replicas][start * self.batch_size :]


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over an ``EpochSampler`` that remembers how many batches of its epoch it has yielded.

    Lightning stores ``state_dict`` with every checkpoint. Batches that workers have prefetched but that were not
    yielded do not count. One iteration at a time.
    """

    _epoch = 0
    _yielded = 0
    _resume: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the rest of the epoch; runs from the first ``next`` on, after Lightning's ``set_epoch``."""
        sampler = self.sampler
        state, self._resume = self._resume, None
        self._epoch = getattr(sampler, "epoch", 0)
        self._yielded = 0
        if state is not None and state["epoch"] == self._epoch and 0 < state["batches"] < len(self):
            self._yielded = self._comparable(state)
        if isinstance(sampler, EpochSampler):
            sampler.start = self._yielded
        for batch in super().__iter__():
            self._yielded += 1
            yield batch

    def _comparable(self, state: dict[str, Any]) -> int:
        signature = self.sampler.signature() if isinstance(self.sampler, EpochSampler) else []
        if state["signature"] == signature:
            return state["batches"]
        rank_zero_warn(
            f"the checkpoint was saved at batch {state['batches']} of an epoch with [records, batch size, processes, "
            f"seed, bucketing] = {state['signature']}, now {signature}: its position means nothing here, "
            "so the epoch starts from its first batch"
        )
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position: epoch, batches yielded in it, and what fixes the order."""
        signature = self.sampler.signature() if isinstance(self.sampler, EpochSampler) else []
        return {"epoch": self._epoch, "batches": self._yielded, "signature": signature}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next iteration of the same epoch start after the batches that were yielded."""
        self._resume = state_dict
        self._epoch, self._yielded = state_dict["epoch"], state_dict["batches"]

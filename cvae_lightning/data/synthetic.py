"""SyntheticDataModule: records of a task, each a pure function of (seed, split, index)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

from cvae_lightning.data.base import RecordDataModule, Split
from cvae_lightning.data.loader import hash_int
from cvae_lightning.data.self_generated import SelfGeneration
from cvae_lightning.data.tasks.base import Ceiling, Task
from cvae_lightning.outputs import Record

MAX_DRAWS = 10_000
MIN_INPUTS = 16


def split_of(x: str) -> Split:
    """Return the split that an input belongs to, whatever the seed: 80 % train, 10 % val, 10 % test, by its hash."""
    bucket = hash_int(f"split/{x}") % 10
    return "train" if bucket < 8 else "val" if bucket == 8 else "test"


@dataclass(frozen=True)
class StrategyFrequencies:
    """p(s|x) as a function of x: what a calibrated router tends to.

    Args:
        weights: S probabilities.
        x_dependent: whether the weights turn with the first character of x.
    """

    weights: tuple[float, ...]
    x_dependent: bool = False

    @classmethod
    def of(cls, frequencies: str | Sequence[float], names: Sequence[str]) -> StrategyFrequencies:
        """Return the frequencies that an option describes, for the given strategies."""
        weights = {"uniform": [1.0] * len(names), "x_dependent": [0.5**i for i in range(len(names))]}
        given = weights.get(frequencies, []) if isinstance(frequencies, str) else frequencies
        if len(given) != len(names) or min(given) < 0 or not 0 < sum(given) < float("inf"):
            raise ValueError(
                f"data.frequencies must be 'uniform', 'x_dependent' or {len(names)} weights >= 0 that do not sum to 0 "
                f"(one for each of {', '.join(names)}), got {frequencies!r}"
            )
        return cls(tuple(weight / sum(given) for weight in given), frequencies == "x_dependent")

    def __call__(self, x: str) -> list[float]:
        """Return p(s|x)."""
        turn = ord(x[0]) % len(self.weights) if self.x_dependent and x else 0
        return [self.weights[i - turn] for i in range(len(self.weights))]


class SyntheticDataModule(RecordDataModule):
    """Records of one synthetic task, drawn on demand: x from the task, s from p(s|x), y from the task's strategy s.

    A record is a pure function of (task, frequencies, seed, split, index): the same on every rank, worker and resume.
    The hash of x decides its split, so that no x is in two splits, under any seed. An x may come up several times in
    its split, with other strategies.

    Args:
        task: the task, as ``class_path`` and ``init_args``.
        train_size: number of training records; they are made on demand, so that a large number costs nothing.
        val_size: number of validation records.
        test_size: number of test records.
        frequencies: p(s|x): ``uniform``; S weights in the order of the task's strategies, whatever x; or
            ``x_dependent``: weights 1, 1/2, 1/4, ... rotated by the code of the first character of x.
        seed: seed of the records and of their order in training.
        batch_size: training records per process and step.
        eval_batch_size: records per process and step of validation, test and prediction; None = ``batch_size``.
        num_workers: worker processes that build batches; 0 = the training process itself.
        length_bucketing: batches of records of similar length, which saves padding.
        pin_memory: pin batches for faster copies to a GPU.
        self_generated: train on solutions that the entangled model draws for the inputs; null = on the task's own.

    Raises:
        ValueError: if a size is not positive or the weights do not fit the task.
    """

    task: Task

    def __init__(
        self,
        task: Task,
        train_size: int = 20_000,
        val_size: int = 1_000,
        test_size: int = 1_000,
        frequencies: Literal["uniform", "x_dependent"] | list[float] = "uniform",
        seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        length_bucketing: bool = False,
        pin_memory: bool = False,
        self_generated: SelfGeneration | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, length_bucketing, pin_memory, self_generated)
        self.task = task
        self.strategy_names = list(task.strategies)
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        for split, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"data.{split}_size must be at least 1, got {size}")
        self.strategy_probs = StrategyFrequencies.of(frequencies, self.strategy_names)
        self._records: dict[Split, SyntheticRecords] = {}
        self._ceilings: dict[tuple[Split, int], Ceiling] = {}

    def has_split(self, split: Split) -> bool:
        """Return True: every split has records."""
        return split in self.sizes

    def given_records(self, split: Split) -> SyntheticRecords:
        """Return the records of a split, computed when they are read."""
        if split not in self._records:
            if split not in self.sizes:
                raise ValueError(f"split must be one of train, val, test, got {split!r}")
            self._records[split] = SyntheticRecords(self, split)
        return self._records[split]

    def ceiling(self, split: Split) -> Ceiling:
        """Return the ceilings of alignment over the inputs of a split (the first 5000), under p(s|x).

        They are those of the trainer's module where it has fewer latents than there are strategies.
        """
        latents = getattr(getattr(self.trainer, "lightning_module", None), "num_latents", 0)
        key = split, min(latents or len(self.strategy_names), len(self.strategy_names))
        if key not in self._ceilings:
            records = self.given_records(split)
            xs = [records[i].x for i in range(min(len(records), 5000))]
            self._ceilings[key] = self.task.ceiling_over(xs, self.strategy_probs, key[1])
        return self._ceilings[key]

    def given_fingerprint(self, split: Split) -> str:
        """Return a hash of everything that the split's records follow from, and of the first of them."""
        records = self.given_records(split)
        probe = [(r.x, r.y, r.strategy) for r in (records[i] for i in range(min(16, len(records))))]
        text = repr((self.task.spec(), self.strategy_probs, self.seed, split, len(records), probe))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class SyntheticRecords(Sequence[Record]):
    """The lazy records of one split.

    Args:
        data: the data module that holds task, sizes, seed and strategy frequencies.
        split: which split.

    Raises:
        ValueError: if the task has too few inputs for this split.
    """

    def __init__(self, data: SyntheticDataModule, split: Split) -> None:
        self.task, self.split, self.seed = data.task, split, data.seed  # not the module: this goes to workers
        self._size, self._probs = data.sizes[split], data.strategy_probs
        probe = random.Random(0)
        if len({self._input(probe) for _ in range(200)}) < MIN_INPUTS:
            raise ValueError(f"{self._too_small()} fewer than {MIN_INPUTS} different inputs fall into it")

    def _too_small(self) -> str:
        return f"task {self.task.spec()} has too few inputs for the split {self.split!r}: make its arguments larger;"

    def _input(self, rng: random.Random) -> str:
        for _ in range(MAX_DRAWS):
            x = self.task.sample_input(rng)
            if split_of(x) == self.split:
                return x
        raise ValueError(f"{self._too_small()} none of {MAX_DRAWS} random inputs falls into it")

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Return the record (or the records of a slice)."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        position = index + self._size if index < 0 else index
        if not 0 <= position < self._size:
            raise IndexError(f"record {index} of {self._size}")
        rng = random.Random(hash_int(f"record/{self.seed}/{self.split}/{position}"))
        x = self._input(rng)
        (strategy,) = rng.choices(range(len(self.task.strategies)), weights=self._probs(x))
        return Record(x, self.task.solve(x, self.task.strategies[strategy]), strategy, position)

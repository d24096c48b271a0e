"""PairsDataModule: the user's own (x, y, strategy?) pairs from files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from cvae_lightning.data.base import RecordDataModule, Split
from cvae_lightning.data.files import Row, listed, read_rows
from cvae_lightning.data.loader import hash_int
from cvae_lightning.data.self_generated import SelfGeneration
from cvae_lightning.outputs import UNLABELLED, Record


@dataclass
class _Pairs:
    """Rows of one split that passed every check; ``names`` holds None where a row has no label."""

    where: list[str] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)

    def subset(self, keep: Sequence[int]) -> _Pairs:
        return _Pairs(*([column[i] for i in keep] for column in (self.where, self.texts, self.names)))  # type: ignore[arg-type]


class PairsDataModule(RecordDataModule):
    """Pairs of texts from JSONL, CSV or a Hugging Face data set.

    A source is a ``.jsonl``, ``.json``, ``.ndjson``, ``.csv`` or ``.tsv`` file in UTF-8 (blank lines are skipped), or,
    where the package ``datasets`` is installed, a folder (of ``save_to_disk``, or of data files) or a data set's name,
    as ``NAME[:CONFIG][#SPLIT]``. All sources are read and checked before anything else happens.

    Args:
        train_path: source of the training records.
        val_path: source of the validation records; None = a part of the training source, see ``val_fraction``.
        test_path: source of the test records; None = no test split.
        x_column: column of the input text.
        y_column: column of the solution text.
        strategy_column: column of the strategy's name, for metrics only; a row may leave it empty. None = no labels.
        val_fraction: share of the training source's inputs that become validation, by the hash of x, so that no x is in
            both; in (0, 1); unused with a ``val_path``.
        seed: seed of the order of training records.
        batch_size: training records per process and step.
        eval_batch_size: records per process and step of validation, test and prediction; None = ``batch_size``.
        num_workers: worker processes that build batches; 0 = the training process itself.
        length_bucketing: batches of records of similar length, which saves padding.
        pin_memory: pin batches for faster copies to a GPU.
        self_generated: train on solutions that the entangled model draws for the inputs, which may then stand without
            any; null = on the given ones.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        train_path: str,
        val_path: str | None = None,
        test_path: str | None = None,
        x_column: str = "x",
        y_column: str = "y",
        strategy_column: str | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        length_bucketing: bool = False,
        pin_memory: bool = False,
        self_generated: SelfGeneration | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, length_bucketing, pin_memory, self_generated)
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction must lie between 0 and 1, got {val_fraction}")
        columns = [column for column in (x_column, y_column, strategy_column) if column is not None]
        if len(set(columns)) < len(columns):
            raise ValueError(f"x_column, y_column and strategy_column must differ, got {columns}")
        self.paths: dict[Split, str | None] = {"train": train_path, "val": val_path, "test": test_path}
        self.x_column, self.y_column, self.strategy_column = x_column, y_column, strategy_column
        self.val_fraction = val_fraction
        self._pairs: dict[Split, _Pairs] = {}
        self._names: list[str] = []
        self._records: dict[Split, list[Record]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and check every source, once."""
        self._read_all()
        super().setup(stage)

    def _read_all(self) -> None:
        if self._records:
            return
        pairs: dict[Split, _Pairs] = {
            split: self._read(path, split) for split, path in self.paths.items() if path is not None
        }
        if "val" not in pairs:
            pairs["train"], pairs["val"] = self._divide(pairs["train"])
        self._compare(pairs)
        names = sorted({name for rows in pairs.values() for name in rows.names if name is not None})
        records = {split: self._labelled(rows, names) for split, rows in pairs.items()}
        self._pairs, self._names, self._records = pairs, names, records

    def _read(self, path: str, split: Split) -> _Pairs:
        pairs, labelled = _Pairs(), False
        default = {"train": "train", "val": "validation", "test": "test"}[split]
        for row in read_rows(path, f"{split}_path", default):
            where, columns = row
            pairs.where.append(where)
            x, bare = self._cell(row, self.x_column), False
            if self.self_generated is not None:
                bare = columns.get(self.y_column) in (None, "")
            elif self.y_column not in columns:
                raise ValueError(
                    f"{where}: no column {self.y_column!r}; the columns are {listed(columns)} (the entangled model can "
                    "solve inputs alone: set data.self_generated)"
                )
            pairs.texts.append((x, "" if bare else self._cell(row, self.y_column)))
            if bool(pairs.texts[-1][1]) != bool(pairs.texts[0][1]):
                solved = pairs.where[0] if bare else where
                raise ValueError(
                    f"{where}: a source holds solutions in all rows or in none, but column {self.y_column!r} is filled "
                    f"in {solved} only"
                )
            has_label = self.strategy_column is not None and columns.get(self.strategy_column) not in (None, "")
            pairs.names.append(self._cell(row, str(self.strategy_column)) if has_label else None)
            labelled = labelled or has_label or self.strategy_column in columns
        if not pairs.where:
            raise ValueError(f"{split}_path: {path!r} holds no records")
        if self.strategy_column is not None and not labelled:
            raise ValueError(
                f"{split}_path: {path!r} has no column {self.strategy_column!r} for strategy_column; its columns are "
                f"{listed(columns)}; set strategy_column to null for data without labels"
            )
        return pairs

    @staticmethod
    def _cell(row: Row, column: str) -> str:
        where, columns = row
        if column not in columns:
            raise ValueError(f"{where}: no column {column!r}; the columns are {listed(columns)}")
        value: Any = columns[column]
        if not isinstance(value, str):
            raise ValueError(f"{where}: column {column!r} must be a text, got {type(value).__name__} {value!r:.60}")
        if not value.strip():
            raise ValueError(f"{where}: column {column!r} is empty")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{where}: column {column!r} holds half of a surrogate pair, which is not a character")
        return value

    def _divide(self, pairs: _Pairs) -> tuple[_Pairs, _Pairs]:
        train: list[int] = []
        val: list[int] = []
        for i, (x, _) in enumerate(pairs.texts):
            (val if hash_int(f"val/{x}") < self.val_fraction * 2**63 else train).append(i)
        if not train or not val:
            raise ValueError(
                f"train_path: {self.paths['train']!r} has {len({x for x, _ in pairs.texts})} different inputs, too few "
                f"to split off val_fraction={self.val_fraction}: give a val_path or change val_fraction"
            )
        return pairs.subset(train), pairs.subset(val)

    @staticmethod
    def _compare(pairs: dict[Split, _Pairs]) -> None:
        """Warn of inputs that are both trained and evaluated on, and of labels that no training record has."""
        train = pairs["train"]
        inputs, names = {x for x, _ in train.texts}, {name for name in train.names if name is not None}
        for split, rows in pairs.items():
            if split == "train":
                continue
            if shared := inputs & {x for x, _ in rows.texts}:
                rank_zero_warn(
                    f"{len(shared)} inputs of {split}_path are in train_path too, such as {min(shared)!r:.60}"
                )
            for where, name in zip(rows.where, rows.names, strict=True):
                if names and name is not None and name not in names:
                    rank_zero_warn(
                        f"{where}: strategy {name!r:.40} does not appear in the training records; there are "
                        f"{listed(sorted(names))}"
                    )
                    break

    @staticmethod
    def _labelled(pairs: _Pairs, names: list[str]) -> list[Record]:
        index = {name: i for i, name in enumerate(names)} | {None: UNLABELLED}
        return [
            Record(x, y, index[name], i) for i, ((x, y), name) in enumerate(zip(pairs.texts, pairs.names, strict=True))
        ]

    @property
    def strategy_names(self) -> list[str]:  # type: ignore[override]
        """Names of the strategies of all records, sorted; empty without labels."""
        self._read_all()
        return self._names

    def has_split(self, split: Split) -> bool:
        """Return whether there are records of this split: always for train and val."""
        return split in ("train", "val") or self.paths.get(split) is not None

    def given_records(self, split: Split) -> list[Record]:
        """Return the records of a split, in the order of the file."""
        self._read_all()
        if split not in self._records:
            raise ValueError(f"there is no split {split!r}: set data.{split}_path")
        return self._records[split]

    def has_solutions(self, split: Split) -> bool:
        """Return whether the source of a split holds solutions, and not inputs alone."""
        return bool(self.given_records(split)[0].y)

    def describe(self, split: Split, index: int) -> str:
        """Return the file and line of a record that was given."""
        if self.is_drawn(split):
            return super().describe(split, index)
        self._read_all()
        return self._pairs[split].where[index]

    def given_fingerprint(self, split: Split) -> str:
        """Return a hash of all texts and labels of a split."""
        digest = hashlib.blake2b(digest_size=8)
        for record in self.given_records(split):
            digest.update(repr((record.x, record.y, record.strategy)).encode())
        return digest.hexdigest()

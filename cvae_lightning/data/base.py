"""RecordDataModule: what every data module offers to modules, callbacks and the command line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Subset

from cvae_lightning.data.loader import EpochSampler, ResumableLoader, world
from cvae_lightning.data.self_generated import DrawnRecords, SelfGeneration, draw_records
from cvae_lightning.data.solution_parts import content_hash
from cvae_lightning.data.tasks.base import Ceiling, Task
from cvae_lightning.outputs import Record
from cvae_lightning.template import PromptTemplate

Split = Literal["train", "val", "test"]
STAGE_SPLITS: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test", "val")}
"""Splits that a command reads (c_base is measured on the validation split); a prediction needs no solutions."""


class RecordDataModule(LightningDataModule, ABC):
    """Serves splits of records as ``PairBatch``es through the module's ``PromptTemplate``.

    Training batches are full and their order is a function of (seed, epoch) alone, so training resumes in the middle of
    an epoch. Evaluation covers every record once, also across ranks. A training split smaller than a batch is served as
    one batch.

    Args:
        batch_size: training records per process and step.
        eval_batch_size: records per process and step of validation, test and prediction; None = ``batch_size``.
        num_workers: worker processes that build batches; 0 = the training process itself.
        seed: seed of the order of training records.
        length_bucketing: batches of records of similar length, which saves padding.
        pin_memory: pin batches for faster copies to a GPU.
        self_generated: solutions that the entangled model draws, in place of given ones; None = the given ones.

    Raises:
        ValueError: if a size is not positive.
    """

    task: Task | None = None
    """The task whose verifier knows the records; None without one."""
    strategy_names: Sequence[str]
    """Names that ``Record.strategy`` indexes; empty without labels."""

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        length_bucketing: bool = False,
        pin_memory: bool = False,
        self_generated: SelfGeneration | None = None,
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = False  # what is drawn lies in one folder for all nodes
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.length_bucketing = length_bucketing
        self.pin_memory = pin_memory
        for name, low in (("batch_size", 1), ("eval_batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"data.{name} must be at least {low}, got {getattr(self, name)}")
        self.self_generated = self_generated
        self.skipped: dict[str, int] = {}
        """Records per split that were left out because they are longer than the template's ``max_length``."""
        self.drawn_counts: dict[str, dict[str, int]] = {}
        """Per split whose solutions were drawn: inputs, solutions, and how many of these were dropped, and why."""
        self._drawn: dict[str, tuple[Any, DrawnRecords]] = {}
        self._template: PromptTemplate | None = None
        self._kept: dict[str, tuple[PromptTemplate, list[int] | None]] = {}

    @abstractmethod
    def given_records(self, split: Split) -> Sequence[Record]:
        """Return the data's own records of a split; ``given_records(split)[i].index == i``.

        Raises:
            ValueError: if there is no such split.
        """

    @abstractmethod
    def given_fingerprint(self, split: Split) -> str:
        """Return a hash of the content of the data's own records, the same in every process."""

    @abstractmethod
    def has_split(self, split: Split) -> bool:
        """Return whether there are records of this split."""

    def has_solutions(self, split: Split) -> bool:
        """Return whether the data's own records of this split hold solutions, and not inputs alone."""
        return True

    def records(self, split: Split) -> Sequence[Record]:
        """Return the records of a split, self-generated or given; ``records(split)[i].index == i``.

        Raises:
            ValueError: if there is no such split, or nothing to draw its solutions from.
        """
        if not self.is_drawn(split):
            return self.given_records(split)
        module = self.trainer.lightning_module  # type: ignore[union-attr]
        if split not in self._drawn or self._drawn[split][0] is not module:
            assert self.self_generated is not None
            self._drawn[split] = module, draw_records(self, split, self.self_generated)
        return self._drawn[split][1]

    def fingerprint(self, split: Split) -> str:
        """Return a hash of the split's content, the same in every process."""
        if not self.is_drawn(split):
            return self.given_fingerprint(split)
        return content_hash(repr([(record.x, record.y) for record in self.records(split)]).encode())

    def is_drawn(self, split: Split) -> bool:
        """Return whether a split's solutions are those that the trainer's model draws.

        An entangled model, which is trained on solutions, draws them only where there are none.
        """
        module = getattr(self.trainer, "lightning_module", None)
        if self.self_generated is None or module is None or self.trainer.predicting:  # type: ignore[union-attr]
            return False
        return not self.has_solutions(split) or (split == "train" and hasattr(module, "reference"))

    def prepare_data(self) -> None:
        """Draw, on rank zero and while the others wait, the solutions that this run needs."""
        if self.trainer is not None:
            self.setup(self.trainer.state.fn)

    def setup(self, stage: str | None = None) -> None:
        """Read the solutions that this run needs, from the disk where they have been drawn."""
        for split in STAGE_SPLITS.get(stage or "", ()):
            if self.has_split(split) and self.is_drawn(split):
                self.records(split)

    def describe(self, split: Split, index: int) -> str:
        """Return where a record comes from, for messages."""
        return f"record {index} of split {split!r}"

    def train_texts(self) -> Iterator[tuple[str, str]]:
        """Yield (x, y) of every training record, for building tokenizers."""
        records = self.records("train")
        for i in range(len(records)):
            record = records[i]
            yield record.x, record.y

    def alphabet(self) -> set[str] | None:
        """Return all characters that texts may use, or None if that is not known."""
        return None if self.task is None else set(self.task.alphabet)

    def ceiling(self, split: Split) -> Ceiling | None:
        """Return the ceilings of alignment on a split; None without a verifier."""
        return None

    def alignment_ceiling(self, split: Split) -> float | None:
        """Return the best one-to-one alignment that any posterior can reach on a split; None without a verifier."""
        ceiling = self.ceiling(split)
        return None if ceiling is None else ceiling.one_to_one

    @property
    def template(self) -> PromptTemplate:
        """The template that builds batches: the one assigned here, else that of the trainer's module."""
        module = getattr(self.trainer, "lightning_module", None)
        template = self._template or getattr(module, "template", None)
        if template is None:
            raise ValueError(
                "the data module has no template: train it with a module that has one, or assign datamodule.template"
            )
        return template

    @template.setter
    def template(self, template: PromptTemplate) -> None:
        self._template = template

    def train_dataloader(self) -> ResumableLoader:
        """Return the resumable loader of full training batches."""
        dataset: Any = self.kept_records("train")
        size, _ = world()
        batch_size = max(1, min(self.batch_size, len(dataset) // size))
        lengths = self._lengths(dataset) if self.length_bucketing else None
        sampler = EpochSampler(dataset, batch_size, seed=self.seed, lengths=lengths)
        return ResumableLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=True, **self._loading())

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the validation split: every record once."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test split: every record once."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test split, or of the validation split where there is no test split."""
        return self._evaluation_loader("test" if self.has_split("test") else "val")

    def _evaluation_loader(self, split: Split) -> DataLoader[Any]:
        dataset: Any = self.kept_records(split)
        size, _ = world()
        if len(dataset) < size:
            raise ValueError(f"split {split!r} has {len(dataset)} records, fewer than the {size} processes")
        sampler = UnrepeatedDistributedSampler(dataset, shuffle=False) if size > 1 else None
        return DataLoader(dataset, batch_size=self.eval_batch_size, sampler=sampler, **self._loading())

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": self.pin_memory,
            "collate_fn": self.template.collate,
            "generator": torch.Generator().manual_seed(self.seed),  # iterating leaves the global generator alone
        }

    def kept_records(self, split: Split) -> Sequence[Record]:
        """Return the records of a split that are served: without those that ``on_overflow: skip`` leaves out.

        Raises:
            ValueError: if there is no template, or a record is too long and none is to be skipped.
        """
        records, kept = self.records(split), self._kept_indices(split)
        return records if kept is None else Subset(records, kept)  # type: ignore[arg-type,return-value]

    def _kept_indices(self, split: Split) -> list[int] | None:
        template = self.template
        if split in self._kept and self._kept[split][0] is template:
            return self._kept[split][1]
        kept: list[int] | None = None
        if template.max_length is not None:
            records = self.records(split)
            kept = []
            for start in range(0, len(records), 1024):
                chunk = [records[i] for i in range(start, min(start + 1024, len(records)))]
                too_long = template.overflows(chunk)
                if template.on_overflow == "error" and True in too_long:
                    where = self.describe(split, start + too_long.index(True))
                    raise ValueError(
                        f"{where} is longer than max_length={template.max_length} tokens: raise max_length, or set "
                        "on_overflow=skip to leave such records out"
                    )
                kept += [start + i for i, overflow in enumerate(too_long) if not overflow]
            self.skipped[split] = len(records) - len(kept)
            if not kept:
                raise ValueError(f"every record of split {split!r} is longer than max_length={template.max_length}")
            if self.skipped[split]:
                rank_zero_info(
                    f"left out {self.skipped[split]} of {len(records)} records of split {split!r}: longer than "
                    f"max_length={template.max_length} tokens"
                )
        self._kept[split] = (template, kept)
        return kept

    @staticmethod
    def _lengths(dataset: Any) -> list[int]:
        return [len(record.x) + len(record.y) for record in (dataset[i] for i in range(len(dataset)))]

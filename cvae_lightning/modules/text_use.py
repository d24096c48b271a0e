"""What the uses of a trained latent have in common: texts in, batches on the device out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from cvae_lightning.modules.base import CVAEModule
from cvae_lightning.outputs import PairBatch, Record

Item = TypeVar("Item")


class TextUse(CVAEModule):
    """The part of a CVAE that reads texts."""

    def text_batches(self, x: Sequence[str], y: Sequence[str] | None, batch_size: int) -> Iterator[PairBatch]:
        """Yield batches of the texts in order, on the module's device.

        Args:
            x: inputs.
            y: one solution per x; None where only x is read.
            batch_size: records in a batch.

        Raises:
            ValueError: if x or y is a single text, their numbers differ, or a record is too long for the model.
        """
        check_texts(x, "x")
        if y is not None:
            check_texts(y, "y")
            if len(x) != len(y):
                raise ValueError(f"x and y must be pairs, got {len(x)} x and {len(y)} y")
        records = [Record(*pair) for pair in zip(x, [""] * len(x) if y is None else y, strict=True)]
        for part in batched(records, batch_size):
            batch = self.template.collate(part)
            if y is not None:
                self.check_positions(batch)
            yield batch.to(self.device)


def check_texts(texts: Sequence[str], name: str) -> None:
    """Raise if texts are not a sequence of strings.

    Raises:
        ValueError: for a single string, whose characters would pass for texts, and for anything that is no string.
    """
    if isinstance(texts, str):
        raise ValueError(f"{name} must be a list of texts, got the single text {texts[:40]!r}: give [{name}]")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} must hold texts, got {text!r:.60} of type {type(text).__name__}")


def batched(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Yield the items in order, ``size`` at a time.

    Raises:
        ValueError: if ``size`` is below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    for start in range(0, len(items), size):
        yield items[start : start + size]


def rounded(values: Tensor) -> Any:
    """Return numbers as plain data of at most six decimals; None where one is not finite."""
    if values.ndim:
        return [rounded(value) for value in values]
    return round(float(values), 6) if bool(values.isfinite()) else None

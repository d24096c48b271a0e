"""What the uses of a trained latent have in common: texts in, batches on the device out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from cvae_lightning.modules.base import CVAEModule
from cvae_lightning.outputs import PairBatch, Record
from cvae_lightning.template import Text

Item = TypeVar("Item")


class TextUse(CVAEModule):
    """The part of a CVAE that reads texts."""

    def text_batches(self, x: Sequence[Text], y: Sequence[Text] | None, batch_size: int) -> Iterator[PairBatch]:
        """Yield batches of the texts in order, on the module's device.

        Args:
            x: inputs, as texts or token ids.
            y: one solution per x, as texts or token ids; None where only x is read.
            batch_size: records in a batch.

        Raises:
            ValueError: if x or y is a single text, their numbers differ, or a record is too long for the model.
        """
        check_texts(x, "x")
        if y is not None:
            check_texts(y, "y")
            if len(x) != len(y):
                raise ValueError(f"x and y must be pairs, got {len(x)} x and {len(y)} y")
        pairs: Any = zip(x, [""] * len(x) if y is None else y, strict=True)
        template = self.template.unlimited()  # the limit is that of records to train on
        for part in batched([Record(*pair) for pair in pairs], batch_size):
            batch = template.collate(part)
            self.check_positions(batch)
            yield batch.to(self.device)


def latent_source(seed: int | None) -> torch.Generator | None:
    """Return the source of the latents' noise for a ``generator_seed``, on the CPU; None = the global one.

    The seed itself belongs to the noise of the tokens: from one stream for both, y would follow z by chance alone.
    """
    return None if seed is None else torch.Generator().manual_seed(_seed_of(f"z/{seed}"))


def record_seeds(places: Iterable[int], seed: int = 0) -> list[int]:
    """Return a seed for every record, of its place and a ``generator_seed``: no two of them have any in common."""
    return [_seed_of(f"record/{seed}/{place}") for place in places]


def _seed_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def check_texts(texts: Sequence[Text], name: str) -> None:
    """Raise if texts are neither all strings nor all lists of token ids.

    Raises:
        ValueError: for a single string, whose characters would pass for texts, and for anything that is no text.
    """
    if isinstance(texts, str):
        raise ValueError(f"{name} must be a list of texts, got the single text {texts[:40]!r}: give [{name}]")
    for text in texts:
        if not (isinstance(text, str) if isinstance(texts[0], str) else _are_ids(text)):
            raise ValueError(
                f"{name} must hold texts, got {text!r:.60} of type {type(text).__name__}: give texts alone, or lists "
                "of token ids alone"
            )


def _are_ids(text: Any) -> bool:
    if isinstance(text, Tensor):
        return text.ndim == 1 and not (text.is_floating_point() or text.is_complex())
    return isinstance(text, list | tuple) and all(isinstance(i, int) for i in text)


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

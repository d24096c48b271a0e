"""Which records of a split stand for it where a model writes for a few inputs only."""

from __future__ import annotations

from typing import Any

from cvae_lightning.outputs import Record

PATIENCE = 100
"""Records looked at for each one wanted, before fewer are taken: a split may be long and made on demand."""


def different_inputs(data: Any, split: str, count: int) -> list[Record]:
    """Return the first ``count`` records with different inputs, of those that the model is evaluated on.

    Fewer where the split has no more. A record that shares its input with an earlier one would weigh that input twice.

    Args:
        data: data module with ``kept_records(split)``, or at least ``records(split)``.
        split: the split.
        count: how many.
    """
    records = data.kept_records(split) if hasattr(data, "kept_records") else data.records(split)
    found: dict[str, Record] = {}
    for index in range(min(len(records), PATIENCE * count)):
        record = records[index]
        found.setdefault(record.x, record)
        if len(found) == count:
            break
    return list(found.values())

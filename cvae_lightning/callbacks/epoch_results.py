"""Reading what an evaluation left behind: a module's metrics and the logged scalars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvae_lightning.metrics.usage import DEAD_SHARE


def metric_result(pl_module: Any, name: str) -> dict[str, Tensor] | None:
    """Return what a module's metric ``name`` computes from this epoch, or None where there is none or no update.

    The metric is an attribute of the module, or of its ``metrics``.

    Communicates under DDP (the result is cached, so the module pays nothing more): call it on every rank, in an
    ``on_*_epoch_end`` hook of a callback, which runs before the module's own and so before any reset.
    """
    metric = _find(pl_module, name)
    return metric.compute() if getattr(metric, "update_called", False) else None


def contingency(pl_module: Any) -> Tensor | None:
    """Return the [K, S] counts of the metric ``alignment``, or None without labelled records; same rules as above."""
    if metric_result(pl_module, "alignment") is None:
        return None
    table = _find(pl_module, "alignment").contingency.detach().cpu().clone()
    return table if int(table.sum()) else None


def _find(pl_module: Any, name: str) -> Any:
    return getattr(pl_module, name, None) or getattr(getattr(pl_module, "metrics", None), name, None)


def dead_latents(usage: Mapping[str, Tensor] | None) -> list[int]:
    """Return the indices of the dead latents in a result of ``LatentUsage``."""
    if usage is None:
        return []
    aggregate = usage["aggregate_posterior"]
    return [int(k) for k in torch.nonzero(aggregate < dead_below(len(aggregate))).flatten()]


def dead_below(num_latents: int) -> float:
    """Return the share of records under which one of ``num_latents`` latents counts as dead."""
    return DEAD_SHARE / num_latents


def logged(metrics: Mapping[str, Any], key: str) -> float:
    """Return a logged scalar; NaN, which no comparison accepts, where it is absent."""
    return float(metrics[key]) if key in metrics else math.nan

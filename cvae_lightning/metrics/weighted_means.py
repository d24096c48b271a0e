"""Exact means of many scalars in one synchronised state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cvae_lightning.metrics.base import SumStatistics, check_names
from cvae_lightning.metrics.figures import Axes, Figure, bars


class WeightedMeans(SumStatistics):
    """Weighted mean of each named scalar over all batches and processes.

    sum w v / sum w, with one state for all names, so an epoch costs one synchronisation. nan for a name that was not
    seen.

    Args:
        names: names of the scalars.
        kwargs: passed on to `torchmetrics.Metric`.

    Example:
        >>> metric = WeightedMeans(["loss", "kl"])
        >>> metric.update({"loss": torch.tensor([1.0, 2.0, 3.0]), "kl": torch.tensor(0.5)}, weight=3)
        >>> metric.update({"loss": torch.tensor([6.0]), "kl": torch.tensor(0.1)}, weight=1)
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'loss': 3.0, 'kl': 0.4}
    """

    sums: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.add_sum("sums", 2, len(self.names))  # weighted values, weights

    def update(self, values: Mapping[str, Tensor | float], weight: float | Tensor = 1.0) -> None:
        """Add one batch.

        Args:
            values: per name either a mean over the batch, [], or one value per example, [B]; missing names are skipped.
            weight: what the batch counts in the means: a number, the weight of each [] value while every example of a
                [B] value counts 1; or [B], the weight of every example, whose sum is the weight of the [] values.
        """
        check_names("WeightedMeans", values, self.names)
        sums = torch.zeros_like(self.sums)
        weights = torch.as_tensor(weight, dtype=sums.dtype, device=sums.device)
        for position, name in enumerate(self.names):
            if name not in values:
                continue
            value = torch.as_tensor(values[name], device=sums.device).detach().to(sums.dtype)
            if value.dim() == 0:
                counts = weights.sum()
            else:
                counts = weights.expand_as(value) if weights.dim() else torch.ones_like(value)
            sums[:, position] = torch.stack([(value * counts).sum(), counts.sum()])
        self.sums = self.sums + sums

    def result(self) -> dict[str, Tensor]:
        """Divide once."""
        return dict(zip(self.names, self.sums[0] / self.sums[1], strict=True))

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw all means."""
        return bars(self.latest(), title="Means", label="value", axes=ax)

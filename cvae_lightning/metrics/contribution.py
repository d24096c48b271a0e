"""Which terms make up the objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cvae_lightning.metrics.base import SumStatistics, check_names
from cvae_lightning.metrics.figures import Axes, Figure, bars


class LossContribution(SumStatistics):
    """Share of each term in the objective: summed |weight_i L_i| over the sum of all of them.

    `compute()` returns one fraction per name; they sum to 1. nan if every contribution is 0 or nothing was seen.

    Args:
        names: names of the terms.
        kwargs: passed on to `torchmetrics.Metric`.

    Example:
        >>> metric = LossContribution(["reconstruction_loss", "kl_prior_loss"])
        >>> metric.update({"reconstruction_loss": torch.tensor(3.0), "kl_prior_loss": torch.tensor(-1.0)})
        >>> {name: fraction.item() for name, fraction in metric.compute().items()}
        {'reconstruction_loss': 0.75, 'kl_prior_loss': 0.25}
    """

    totals: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.add_sum("totals", len(self.names))

    def update(self, contributions: Mapping[str, Tensor | float]) -> None:
        """Add one step.

        Args:
            contributions: weight_i L_i of each term, of which the absolute value counts; a missing name adds 0.
        """
        check_names("LossContribution", contributions, self.names)
        step = [torch.as_tensor(contributions.get(name, 0.0)).detach().to(self.totals) for name in self.names]
        self.totals = self.totals + torch.stack(step).abs()

    def result(self) -> dict[str, Tensor]:
        """Normalise once."""
        return dict(zip(self.names, self.totals / self.totals.sum(), strict=True))

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the fractions."""
        return bars(self.latest(), title="Share of each term in the objective", label="share", limit=1.0, axes=ax)

"""Agreement of latents with ground-truth strategies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cvae_lightning.metrics.base import SumStatistics, check_counts, check_range, check_shape
from cvae_lightning.metrics.figures import Axes, Figure, heatmap
from cvae_lightning.metrics.matching import clustering_scores


class StrategyAlignment(SumStatistics):
    """How well the latent of each record tells its strategy, from one K x S contingency table.

    `compute()` returns `one_to_one` (accuracy of the best one-to-one matching of latents and strategies), `ami`, `nmi`,
    `homogeneity`, `completeness`, `v_measure`, `purity`, `num_labelled` and `num_unlabelled`. Scores are nan without
    labelled records. With K > S or K < S, `one_to_one` cannot exceed the share of records that the matching can cover.

    Args:
        num_latents: K, at least 1.
        num_strategies: S, at least 1.
        kwargs: passed on to `torchmetrics.Metric`.

    Example:
        >>> metric = StrategyAlignment(num_latents=2, num_strategies=2)
        >>> metric.update(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, -1]))
        >>> scores = metric.compute()
        >>> scores["one_to_one"].item(), scores["num_unlabelled"].item()
        (1.0, 1)
    """

    higher_is_better = True
    table: Tensor

    def __init__(self, num_latents: int, num_strategies: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_counts(num_latents=num_latents, num_strategies=num_strategies)
        self.num_latents, self.num_strategies = num_latents, num_strategies
        self.add_sum("table", num_latents, num_strategies + 1, dtype=torch.int64)  # last column: unlabelled
        self._contingency = self.table[:, :-1]

    def update(self, latents: Tensor, strategies: Tensor) -> None:
        """Count N records.

        Args:
            latents: [N] index of the latent chosen for each record.
            strategies: [N] index of its strategy, or -1 where unknown (skipped and counted).
        """
        check_shape("latents", latents, "N")
        check_shape("strategies", strategies, latents.shape[0])
        check_range("latents", latents, 0, self.num_latents)
        check_range("strategies", strategies, -1, self.num_strategies)
        columns = torch.where(strategies < 0, self.num_strategies, strategies)
        cells = latents * (self.num_strategies + 1) + columns
        self.table = self.table + torch.bincount(cells, minlength=self.table.numel()).view_as(self.table)

    def result(self) -> dict[str, Tensor]:
        """Derive all scores from the table."""
        self._contingency = self.table[:, :-1].clone()
        scores = clustering_scores(self._contingency.cpu().numpy())
        result = {name: torch.tensor(value, dtype=torch.float64) for name, value in scores.items()}
        return {**result, "num_labelled": self._contingency.sum(), "num_unlabelled": self.table[:, -1].sum()}

    @property
    def contingency(self) -> Tensor:
        """[K, S] int64 counts over all processes; calls `latest()`."""
        self.latest()
        return self._contingency

    def plot(
        self,
        ax: Axes | None = None,
        *,
        latent_names: Sequence[str] | None = None,
        strategy_names: Sequence[str] | None = None,
        title: str = "Strategy of each latent: share of row (count)",
    ) -> tuple[Figure, Axes]:
        """Draw the contingency table, coloured by the share of each latent's records."""
        counts = self.contingency.cpu()
        shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
        notes = [[f"{s:.2f}\n({c})" for s, c in zip(*row, strict=True)] for row in zip(shares, counts, strict=True)]
        return heatmap(shares, row_names=latent_names, column_names=strategy_names, notes=notes, title=title, axes=ax)

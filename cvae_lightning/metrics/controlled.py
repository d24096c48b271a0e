"""Agreement of forced latents with the strategies that their generations follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cvae_lightning.metrics.base import SumStatistics, check_shape
from cvae_lightning.metrics.figures import Axes, Figure, heatmap
from cvae_lightning.metrics.matching import best_matching


class ControlledAlignment(SumStatistics):
    """Whether forcing a latent forces a strategy.

    A[k,s] = mean over the inputs i of 1[s in M_i(k)] / |M_i(k)|, where M_i(k) is the set of strategies whose trace
    equals the generation for x_i under z_k; an output that follows no strategy counts as 0. `compute()` returns
    `matrix` (A, [K, S]) and `one_to_one`, the mean entry of A on the best one-to-one matching of latents and
    strategies, which has min(K, S) entries: latents beyond the number of strategies are left out. nan without
    generations; a latent without generations has a row of 0.

    Args:
        num_latents: K, at least 1.
        num_strategies: S, at least 1.
        kwargs: passed on to `torchmetrics.Metric`.

    Example:
        >>> metric = ControlledAlignment(num_latents=2, num_strategies=2)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([[True, True], [False, True]]))
        >>> metric.compute()["one_to_one"].item()  # (1/2 + 1) / 2
        0.75
    """

    higher_is_better = True
    shares: Tensor
    counts: Tensor

    def __init__(self, num_latents: int, num_strategies: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_latents, self.num_strategies = num_latents, num_strategies
        self.add_sum("shares", num_latents, num_strategies)
        self.add_sum("counts", num_latents, dtype=torch.int64)

    def update(self, latent: Tensor, compatible: Tensor) -> None:
        """Add N generations.

        Args:
            latent: [N] index of the latent that was forced.
            compatible: [N, S] bool, True where the output is the trace of that strategy.
        """
        check_shape("latent", latent, "N")
        check_shape("compatible", compatible, latent.shape[0], self.num_strategies)
        shares = compatible.to(self.shares) / compatible.sum(-1, keepdim=True).clamp_min(1)
        forced = torch.nn.functional.one_hot(latent, self.num_latents)  # [N, K]
        self.shares = self.shares + forced.to(self.shares).t() @ shares
        self.counts = self.counts + forced.sum(0)

    def result(self) -> dict[str, Tensor]:
        """Derive A and its matching."""
        matrix = self.shares / self.counts.clamp_min(1)[:, None]
        if not self.counts.any():
            matrix = torch.full_like(matrix, torch.nan)
            return {"one_to_one": matrix[0, 0], "matrix": matrix}
        rows, columns = best_matching(matrix.cpu().numpy())
        return {"one_to_one": matrix[rows, columns].mean(), "matrix": matrix}

    def plot(
        self,
        ax: Axes | None = None,
        *,
        latent_names: Sequence[str] | None = None,
        strategy_names: Sequence[str] | None = None,
        title: str = "Strategy of generations under each forced latent",
    ) -> tuple[Figure, Axes]:
        """Draw A."""
        matrix = self.latest()["matrix"].cpu().view(self.num_latents, self.num_strategies)
        return heatmap(matrix, row_names=latent_names, column_names=strategy_names, title=title, axes=ax)

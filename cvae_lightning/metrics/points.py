"""The latents of an evaluation epoch themselves, for scores that no sum can give: probes and clusters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvae_lightning.metrics.base import FixedPrecision, check_shape


class LatentPoints(FixedPrecision):
    """Posterior and router means of every record, over all processes, in the order of the records.

    `compute()` returns `posterior_mean`, `router_mean`, [N, D] fp32 each, `strategy` and `index`, [N]. Records that a
    distributed sampler repeats are dropped by their index. Memory is O(N D), unlike that of the package's other
    metrics; `max_points` bounds it.

    Args:
        latent_dim: D, at least 1.
        max_points: records kept per process; later ones are ignored.
        kwargs: passed on to `torchmetrics.Metric`.

    Example:
        >>> metric = LatentPoints(latent_dim=1)
        >>> metric.update(torch.tensor([[2.0], [1.0]]), torch.zeros(2, 1), torch.tensor([0, -1]), torch.tensor([5, 3]))
        >>> metric.compute()["posterior_mean"].tolist()
        [[1.0], [2.0]]
    """

    full_state_update = False
    is_differentiable = False
    rows: list[Tensor]

    def __init__(self, latent_dim: int, max_points: int = 20000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.latent_dim, self.max_points = latent_dim, max_points
        self.add_state("rows", [], dist_reduce_fx="cat")  # posterior, router, strategy, index

    def update(self, posterior_mean: Tensor, router_mean: Tensor, strategy: Tensor, index: Tensor) -> None:
        """Add B records.

        Args:
            posterior_mean, router_mean: [B, D].
            strategy: [B] labels, -1 where unknown.
            index: [B] positions of the records in their split.
        """
        check_shape("posterior_mean", posterior_mean, "B", self.latent_dim)
        check_shape("router_mean", router_mean, posterior_mean.shape[0], self.latent_dim)
        room = self.max_points - sum(map(len, self.rows))
        if room > 0:
            labels = torch.stack([strategy, index], -1)
            self.rows.append(torch.cat([posterior_mean, router_mean, labels], -1).detach().double()[:room])

    def compute(self) -> dict[str, Tensor]:
        """Sort by index and drop what is repeated."""
        rows = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        if not isinstance(rows, Tensor):
            rows = torch.zeros(0, 2 * self.latent_dim + 2, dtype=torch.float64)
        rows = rows[rows[:, -1].argsort(stable=True)]
        new = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        new[1:] = rows[1:, -1] != rows[:-1, -1]
        rows = rows[new].cpu()
        return {
            "posterior_mean": rows[:, : self.latent_dim].float(),
            "router_mean": rows[:, self.latent_dim : -2].float(),
            "strategy": rows[:, -2].long(),
            "index": rows[:, -1].long(),
        }

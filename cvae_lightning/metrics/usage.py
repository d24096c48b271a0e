"""Which latents are used, by the posterior and by the router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvae_lightning.functional import categorical_entropy
from cvae_lightning.metrics.base import SumStatistics, check_shape
from cvae_lightning.metrics.figures import Axes, Figure, grouped_bars

DEAD_SHARE = 0.1
"""A latent is dead if its aggregate posterior is below this share of the uniform 1 / K."""


class LatentUsage(SumStatistics):
    """Mean posterior and router over all records, and how spread out they are.

    `compute()` returns `aggregate_posterior` and `aggregate_router` ([K] each), `usage_perplexity` = exp H(aggregate
    posterior) between 1 and K, `dead_latents` (number of latents whose aggregate posterior is below 0.1 / K), and the
    mean entropy per record `posterior_entropy` and `router_entropy` between 0 and log K, in nats. nan without records.

    Args:
        num_latents: K, at least 1.
        kwargs: passed on to `torchmetrics.Metric`.

    Example:
        >>> metric = LatentUsage(num_latents=4)
        >>> sure, even = torch.eye(4)[:2].log(), torch.full((2, 4), 0.25).log()
        >>> metric.update(posterior_log_probs=sure, router_log_probs=even)
        >>> usage = metric.compute()
        >>> round(usage["usage_perplexity"].item(), 4), usage["dead_latents"].item()
        (2.0, 2)
    """

    sums: Tensor
    entropies: Tensor
    count: Tensor

    def __init__(self, num_latents: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_latents = num_latents
        self.add_sum("sums", 2, num_latents)
        self.add_sum("entropies", 2)
        self.add_sum("count", dtype=torch.int64)

    def update(self, posterior_log_probs: Tensor, router_log_probs: Tensor) -> None:
        """Add B records.

        Args:
            posterior_log_probs: [B, K] normalised log q(z|x,y).
            router_log_probs: [B, K] normalised log p(z|x).
        """
        check_shape("posterior_log_probs", posterior_log_probs, "B", self.num_latents)
        check_shape("router_log_probs", router_log_probs, posterior_log_probs.shape[0], self.num_latents)
        both = torch.stack([posterior_log_probs, router_log_probs]).detach().double()
        self.sums = self.sums + both.exp().sum(1)
        self.entropies = self.entropies + categorical_entropy(both).sum(1)
        self.count = self.count + posterior_log_probs.shape[0]

    def result(self) -> dict[str, Tensor]:
        """Divide by the number of records."""
        posterior, router = self.sums / self.count
        posterior_entropy, router_entropy = self.entropies / self.count
        return {
            "aggregate_posterior": posterior,
            "aggregate_router": router,
            "usage_perplexity": categorical_entropy(posterior.log()).exp(),
            "dead_latents": (posterior < DEAD_SHARE / self.num_latents).sum(),
            "posterior_entropy": posterior_entropy,
            "router_entropy": router_entropy,
        }

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the aggregate posterior and router per latent, with the uniform share as a line."""
        latest = self.latest()
        return grouped_bars(
            {"posterior": latest["aggregate_posterior"], "router": latest["aggregate_router"]},
            names=[f"z{k}" for k in range(self.num_latents)],
            title=f"Latent usage: perplexity {float(latest['usage_perplexity']):.2f} of {self.num_latents}",
            label="share of records",
            line=1 / self.num_latents,
            axes=ax,
        )

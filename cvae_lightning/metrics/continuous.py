"""All metrics of a continuous CVAE, updated once per batch and read once per epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvae_lightning.functional import gaussian_entropy, gaussian_kl
from cvae_lightning.metrics.base import SumStatistics, check_shape
from cvae_lightning.metrics.epoch import EpochMetrics
from cvae_lightning.metrics.figures import Axes, Figure, grouped_bars
from cvae_lightning.metrics.points import LatentPoints
from cvae_lightning.metrics.weighted_means import WeightedMeans
from cvae_lightning.outputs import ContinuousOutputs, PairBatch, require


class LatentMoments(SumStatistics):
    """Per dimension: how much the posterior means move, how noisy they are, and where the routers lie together.

    `compute()` returns, [D] each, `posterior_mean_mean` and `posterior_mean_variance` (mean and variance over the
    records of E_q[z]), `posterior_variance` (mean of the posterior variances), `router_mean` and `router_variance` (the
    moment-matched router marginal), and as numbers `active_units`, the dimensions with a `posterior_mean_variance`
    above delta, and `count`, the records. With D = 1 all are [], as torchmetrics hands out single numbers;
    `by_dimension()` has them as [1].
    Source: Burda et al. 2016, Section 5.2, arXiv 1509.00519 (active units).

    Args:
        latent_dim: D, at least 1.
        delta: variance above which a dimension counts as active, in squared latent units.
        kwargs: passed on to `torchmetrics.Metric`.

    Example:
        >>> metric = LatentMoments(latent_dim=2)
        >>> mean, logvar = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2, 2)
        >>> metric.update(mean, logvar, torch.zeros(2, 2), logvar)
        >>> result = metric.compute()
        >>> result["active_units"].item(), result["posterior_mean_variance"].tolist()
        (1, [1.0, 0.0])
    """

    count: Tensor
    sums: Tensor

    def __init__(self, latent_dim: int, delta: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.latent_dim, self.delta = latent_dim, delta
        self.add_sum("count", dtype=torch.int64)
        self.add_sum("sums", 5, latent_dim)

    def update(
        self, posterior_mean: Tensor, posterior_logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor
    ) -> None:
        """Add B records; all arguments are [B, D]."""
        for name, value in (("posterior_mean", posterior_mean), ("prior_mean", prior_mean)):
            check_shape(name, value, "B", self.latent_dim)
        mean, router = posterior_mean.detach().double(), prior_mean.detach().double()
        parts = (
            mean,
            mean.square(),
            posterior_logvar.detach().double().exp(),
            router,
            router.square() + prior_logvar.detach().double().exp(),
        )
        self.sums = self.sums + torch.stack([part.sum(0) for part in parts])
        self.count = self.count + len(mean)

    def result(self) -> dict[str, Tensor]:
        """Divide once."""
        mean, square, variance, router, router_square = self.sums / self.count
        moved = (square - mean.square()).clamp_min(0)
        return {
            "posterior_mean_mean": mean,
            "posterior_mean_variance": moved,
            "posterior_variance": variance,
            "router_mean": router,
            "router_variance": (router_square - router.square()).clamp_min(0),
            "active_units": (moved > self.delta).sum(),
            "count": self.count,
        }

    def by_dimension(self) -> dict[str, Tensor]:
        """Return what `compute()` returns, [D] also where D = 1."""
        numbers = ("active_units", "count")
        return {name: value if name in numbers else value.reshape(-1) for name, value in self.compute().items()}

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw signal, noise and router variance per dimension."""
        latest = self.latest()
        return grouped_bars(
            {
                "variance of posterior means": latest["posterior_mean_variance"],
                "mean posterior variance": latest["posterior_variance"],
                "router marginal variance": latest["router_variance"],
            },
            names=[f"d{d}" for d in range(self.latent_dim)],
            title=f"Latent dimensions: {int(latest['active_units'])} of {self.latent_dim} active",
            label="squared latent units",
            line=1.0,
            axes=ax,
        )


class ContinuousMetrics(EpochMetrics):
    """Evidence, reconstruction ratio, latent moments and raw terms of one evaluation epoch.

    ``points`` keeps the means themselves, for probes and clusters.

    Args:
        latent_dim: D.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.moments = LatentMoments(latent_dim)
        self.points = LatentPoints(latent_dim)
        self.errors = WeightedMeans(["squared_error", "tokens"])

    def update(
        self,
        outputs: ContinuousOutputs,
        batch: PairBatch,
        terms: Mapping[str, Tensor],
        extra: Mapping[str, Tensor],
    ) -> None:
        """Add one batch.

        Args:
            outputs: of the step.
            batch: its records.
            terms: raw terms, [] each. extra: diagnostics of the losses, [] each.
        """
        gaussians = (outputs.posterior_mean, outputs.posterior_logvar, outputs.prior_mean, outputs.prior_logvar)
        expected_nll, kl = outputs.posterior_sequence_nll.mean(-1), gaussian_kl(*gaussians)
        tokens = self.add_costs(outputs, require(outputs, "log_evidence"), expected_nll)
        self.errors.update({"squared_error": require(outputs, "log_evidence_error").square(), "tokens": tokens})
        self.moments.update(*gaussians)
        self.points.update(outputs.posterior_mean, outputs.prior_mean, batch.strategy, batch.index)
        scalars = {
            "elbo": -expected_nll - kl,
            "diagnostics/prior_kl": kl,
            "diagnostics/posterior_entropy": gaussian_entropy(outputs.posterior_logvar),
            "diagnostics/router_entropy": gaussian_entropy(outputs.prior_logvar),
        }
        self.add_scalars(terms, extra, scalars, len(tokens))

    def compute_and_reset(self, c_base: float | None) -> dict[str, Tensor]:
        """Return the epoch's metrics by log key, without stage, and start anew."""
        result, moments, errors = self.costs_and_scalars(c_base), self.moments.by_dimension(), self.errors.compute()
        # the records' errors are independent: variances add
        records = moments["count"]
        result["marginal_nll_standard_error"] = (errors["squared_error"] / records).sqrt() / errors["tokens"]
        result["diagnostics/active_units"] = moments["active_units"]
        result["diagnostics/active_units_delta"] = torch.tensor(self.moments.delta)
        result["diagnostics/posterior_std"] = moments["posterior_variance"].mean().sqrt()
        for d in range(self.moments.latent_dim):
            result |= {f"router_marginal/{key}_d{d}": moments[f"router_{key}"][d] for key in ("mean", "variance")}
            result[f"posterior_std/d{d}"] = moments["posterior_variance"][d].sqrt()
        self.reset()
        return self.on_device(result)

"""Evaluation of a continuous latent: probes, clusters, and generation from the clusters' centroids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from cvae_lightning.callbacks.epoch_results import metric_result
from cvae_lightning.callbacks.evaluation import StrategyEvaluation
from cvae_lightning.metrics import StrategyAlignment
from cvae_lightning.metrics.discrete import ALIGNMENT_KEYS
from cvae_lightning.metrics.probe import Clusterer, Clusters, cluster, linear_probe_accuracy
from cvae_lightning.outputs import Record


class ContinuousEvaluation(StrategyEvaluation):
    """Asks whether a continuous latent holds the strategy, and whether setting it sets the strategy.

    With strategy labels it logs, under ``val/`` or ``test/``: ``probe/posterior_accuracy`` and
    ``probe/router_accuracy``, what a linear classifier tells from the means of q(z|x,y) and p(z|x) on held-out records
    (the router sees x alone: above the floor it knows which strategies suit x), and ``probe/floor``, the same on
    permuted labels. The posterior means are then divided into clusters, without labels: ``alignment/...`` says how
    clusters and strategies agree, ``clusters/min_distance`` (latent units) and ``clusters/separation`` (that over the
    spread within clusters) how far apart they lie. Generation with z at every centroid gives the ``controlled/...``
    keys of :class:`StrategyEvaluation`; ``sampled/...`` and ``greedy/...`` draw z from the router.

    Args:
        num_examples: different inputs of the split to generate for, the first ones.
        every_n_validations: evaluate at every n-th validation of a fit.
        sampled: also generate from the router.
        max_new_tokens: longest generation in tokens; None = the module's default.
        batch_size: sequences generated at once.
        seed: of sampled latents and tokens, of the clustering and of the permuted labels.
        num_clusters: number of clusters; None = that of the data's strategies, or 4 where it names none.
        clusterer: ``kmeans`` or ``gaussian_mixture``.

    Raises:
        ValueError: if a number is below 1, or the clusterer is unknown.
    """

    def __init__(
        self,
        num_examples: int = 64,
        every_n_validations: int = 1,
        sampled: bool = True,
        max_new_tokens: int | None = None,
        batch_size: int = 256,
        seed: int = 0,
        num_clusters: int | None = None,
        clusterer: Clusterer = "kmeans",
    ) -> None:
        super().__init__(num_examples, every_n_validations, sampled, max_new_tokens, batch_size, seed)
        if num_clusters is not None and num_clusters < 1:
            raise ValueError(f"ContinuousEvaluation: num_clusters must be at least 1, got {num_clusters}")
        if clusterer not in ("kmeans", "gaussian_mixture"):
            raise ValueError(f"clusterer must be 'kmeans' or 'gaussian_mixture', got {clusterer!r}")
        self.num_clusters = num_clusters
        self.clusterer: Clusterer = clusterer
        self.points: dict[str, Tensor] | None = None
        """Posterior and router means of the last evaluation, with labels; equal on every rank."""
        self.clusters: Clusters | None = None
        """Clusters of the posterior means."""
        self.contingency: Tensor | None = None
        """[K, S] counts of clusters and strategies."""

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.points, self.clusters, self.contingency = metric_result(pl_module, "points"), None, None
        if self.points is None:
            return
        data: Any = getattr(trainer, "datamodule", None)
        names = list(getattr(data, "strategy_names", None) or [])
        scores = self._probe(self.points) if names else {}
        number = self.num_clusters or len(names) or 4
        posterior = self.points["posterior_mean"]
        if len(posterior) >= number and bool(posterior.isfinite().all()):
            self.clusters = cluster(posterior, number, self.clusterer, self.seed)
            distances, separation = self.clusters.separation(posterior)
            if number > 1:
                off_diagonal = ~torch.eye(number, dtype=torch.bool)
                scores["clusters/min_distance"] = float(distances[off_diagonal].min())
                scores["clusters/separation"] = separation
            scores |= self._align(self.clusters, self.points["strategy"], len(names))
            super()._evaluate(trainer, _AtCentroids(pl_module, self.clusters.centroids), stage)
        scores = {key: value for key, value in scores.items() if value == value}
        pl_module.log_dict({f"{stage}/{key}": value for key, value in scores.items()}, sync_dist=True)
        self.scores |= scores

    def _probe(self, points: dict[str, Tensor]) -> dict[str, float]:
        labels = points["strategy"]
        return {
            "probe/posterior_accuracy": linear_probe_accuracy(points["posterior_mean"], labels),
            "probe/router_accuracy": linear_probe_accuracy(points["router_mean"], labels),
            "probe/floor": linear_probe_accuracy(points["posterior_mean"], labels, shuffle_seed=self.seed),
        }

    def _align(self, clusters: Clusters, labels: Tensor, num_strategies: int) -> dict[str, float]:
        if not num_strategies or not bool((labels >= 0).any()):
            return {}
        known = labels >= 0  # every rank holds all points, so nothing is to be reduced: count by hand
        alignment = StrategyAlignment(len(clusters.centroids), num_strategies, sync_on_compute=False)
        alignment.update(clusters.assignment[known], labels[known])
        result = alignment.compute()
        self.contingency = alignment.contingency
        return {f"alignment/{key}": float(result[key]) for key in ALIGNMENT_KEYS}

    def _sampled(self, trainer: Trainer, module: Any, share: Sequence[Record], task: Any, uniform: Tensor) -> None:
        super()._sampled(trainer, module.without_centroids, share, task, uniform)


class _AtCentroids:
    """A continuous module seen as one with K latents: latent k is centroid k."""

    def __init__(self, module: Any, centroids: Tensor) -> None:
        self._module, self._centroids = module, centroids
        self.num_latents = len(centroids)

    @property
    def without_centroids(self) -> Any:
        return self._module

    def generate(self, x: Sequence[str], z: Sequence[int], **options: Any) -> list[str]:
        return self._module.generate(x, self._centroids[list(z)], **options)

    def __getattr__(self, name: str) -> Any:
        if name in ("route", "generate_all"):
            raise AttributeError(f"a continuous module has no {name} over K latents")
        return getattr(self._module, name)

"""What latents tell about strategies: a linear probe, and clusters. Pure functions of points and labels."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Clusterer = Literal["kmeans", "gaussian_mixture"]


def linear_probe_accuracy(points: Tensor, labels: Tensor, shuffle_seed: int | None = None) -> float:
    """Accuracy of a linear classifier of the strategy on held-out points.

    A logistic regression on standardised points, fitted on a random half of them and scored on the other, and the other
    way round; the mean of both. Bounds: 0, 1. With ``shuffle_seed`` the labels are permuted first, which gives the
    floor that a latent without information reaches.
    Source: Alain & Bengio 2017, arXiv 1610.01644 (linear probes).

    Args:
        points: one latent per record.
        labels: strategies; records with -1 are left out.
        shuffle_seed: seed of the permutation; None = the labels as they are.

    Shape:
        points: [N, D]; labels: [N] -> a number, nan with fewer than two strategies or ten labelled records.

    Example:
        >>> points = torch.tensor([[-1.0], [1.0]]).repeat(10, 1).repeat_interleave(2, 0)
        >>> linear_probe_accuracy(points, (points[:, 0] > 0).long())
        1.0
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = labels >= 0
    x, y = points[known].double().numpy(), labels[known].numpy()
    if shuffle_seed is not None:
        y = np.random.default_rng(shuffle_seed).permutation(y)
    order = np.random.default_rng(0).permutation(len(y))  # records may be listed by strategy, or strategies in turn
    halves = (order[::2], order[1::2])
    if len(y) < 10 or any(len(np.unique(y[half])) < 2 for half in halves) or not np.isfinite(x).all():
        return float("nan")
    scores = []
    for fit, score in (halves, halves[::-1]):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=100.0, max_iter=1000))
        scores.append(probe.fit(x[fit], y[fit]).score(x[score], y[score]))
    return float(np.mean(scores))


class Clusters(NamedTuple):
    """Clusters of latents.

    Shape:
        centroids: [K, D]. assignment: [N] int64.
    """

    centroids: Tensor
    assignment: Tensor

    def separation(self, points: Tensor) -> tuple[Tensor, float]:
        """Return the centroids' pairwise distances [K, K], in latent units, and their spread-free least.

        The second is the smallest distance between two centroids over the root mean squared distance, per dimension,
        of points from their centroid: above about 4 the clusters hardly touch.
        """
        distances = torch.cdist(self.centroids, self.centroids)
        off = distances[~torch.eye(len(distances), dtype=torch.bool)]
        spread = (points - self.centroids[self.assignment]).square().mean().sqrt()
        return distances, float(off.min() / spread.clamp_min(1e-12)) if len(off) else float("nan")


def cluster(points: Tensor, num_clusters: int, method: Clusterer = "kmeans", seed: int = 0) -> Clusters:
    """Divide latents into clusters without looking at labels; clusters are ordered by their centroids.

    Args:
        points: latents.
        num_clusters: K, at least 1 and at most N.
        method: ``kmeans`` (10 starts) or ``gaussian_mixture`` (full covariances, 5 starts).
        seed: of the starts.

    Shape:
        points: [N, D].

    Raises:
        ValueError: for an unknown method, or fewer points than clusters.
    """
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    if not 1 <= num_clusters <= len(points):
        raise ValueError(f"num_clusters must lie between 1 and the number of points {len(points)}, got {num_clusters}")
    x = points.double().numpy()
    if method == "kmeans":
        model = KMeans(num_clusters, n_init=10, random_state=seed).fit(x)
        centroids = model.cluster_centers_
    elif method == "gaussian_mixture":
        model = GaussianMixture(num_clusters, n_init=5, random_state=seed, reg_covar=1e-5).fit(x)
        centroids = model.means_
    else:
        raise ValueError(f"clusterer must be 'kmeans' or 'gaussian_mixture', got {method!r}")
    order = np.lexsort(centroids.T[::-1])
    rank = np.argsort(order)
    assignment = torch.from_numpy(rank[model.predict(x)].astype(np.int64))
    return Clusters(torch.from_numpy(centroids[order]).float(), assignment)

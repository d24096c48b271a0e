"""Scores of a latent x strategy table: pure functions of a NumPy matrix."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics.cluster import expected_mutual_information


def best_matching(matrix: NDArray) -> tuple[NDArray, NDArray]:
    """Match rows with columns one to one so that the sum of the matched entries is largest (Hungarian algorithm).

    Source: Kuhn 1955. Returns the matched rows and columns, min(rows, columns) of each.

    Example:
        >>> rows, columns = best_matching(np.array([[1, 9], [8, 9]]))
        >>> columns.tolist()
        [1, 0]
    """
    return linear_sum_assignment(matrix, maximize=True)


def latent_strategies(table: NDArray) -> NDArray:
    """Return the strategy that each latent stands for, from counts: latents in rows, strategies in columns.

    As many latents as strategies: the best one-to-one matching. Otherwise each latent's commonest strategy, and -1 for
    a latent without counts.

    Example:
        >>> latent_strategies(np.array([[4, 3], [5, 0]])).tolist(), latent_strategies(np.array([[4], [0]])).tolist()
        ([1, 0], [0, -1])
    """
    if table.shape[0] == table.shape[1]:
        return best_matching(table)[1]
    return np.where(table.sum(1) > 0, table.argmax(1), -1)


def entropy(counts: NDArray) -> float:
    """Entropy in nats of the distribution proportional to ``counts``.

    Example:
        >>> round(entropy(np.array([5, 5])), 4)
        0.6931
    """
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def mutual_information(table: NDArray) -> float:
    """Mutual information in nats of the row and the column of a random count of the table.

    Example:
        >>> round(mutual_information(np.array([[5, 0], [0, 5]])), 4)
        0.6931
    """
    rows, columns = np.nonzero(table)
    joint = table[rows, columns] / table.sum()
    expected = table.sum(1)[rows] / table.sum() * (table.sum(0)[columns] / table.sum())
    return max(0.0, float((joint * np.log(joint / expected)).sum()))


def clustering_scores(table: NDArray) -> dict[str, float]:
    """Agreement of two labelings from their contingency table: latents in rows, strategies in columns.

    one_to_one: share of counts on the best one-to-one matching. purity: share of counts on each latent's commonest
    strategy. homogeneity: 1 - H(strategy | latent) / H(strategy); completeness the reverse; v_measure their harmonic
    mean. nmi: mutual information over the mean of both entropies. ami: the same corrected for chance. All are at most
    1, and at least 0 but for ami, which is 0 on average for independent labels. All are nan for an empty table.
    Source: Rosenberg & Hirschberg 2007 (V-measure); Vinh et al. 2010 (AMI).

    Example:
        >>> scores = clustering_scores(np.array([[4, 1], [0, 5]]))
        >>> scores["one_to_one"], scores["purity"]
        (0.9, 0.9)
    """
    table = table[table.sum(1) > 0][:, table.sum(0) > 0].astype(np.int64)
    total = int(table.sum())
    names = ("one_to_one", "ami", "nmi", "homogeneity", "completeness", "v_measure", "purity")
    if total == 0:
        return dict.fromkeys(names, math.nan)
    information, h_latent, h_strategy = mutual_information(table), entropy(table.sum(1)), entropy(table.sum(0))
    homogeneity = information / h_strategy if h_strategy > 0 else 1.0
    completeness = information / h_latent if h_latent > 0 else 1.0
    both = homogeneity + completeness
    values = (
        table[best_matching(table)].sum() / total,
        _adjusted_mutual_information(table, information, (h_latent + h_strategy) / 2),
        information / ((h_latent + h_strategy) / 2) if h_latent + h_strategy > 0 else 1.0,
        homogeneity,
        completeness,
        2 * homogeneity * completeness / both if both > 0 else 0.0,
        table.max(1).sum() / total,
    )
    return dict(zip(names, map(float, values), strict=True))


def _adjusted_mutual_information(table: NDArray, information: float, mean_entropy: float) -> float:
    """(MI - E[MI]) / (mean entropy - E[MI]) under random labelings with the same marginals."""
    if table.shape == (1, 1):
        return 1.0
    if 1 in table.shape:
        return 0.0
    expected = expected_mutual_information(table, int(table.sum()))
    smallest = np.finfo(np.float64).eps
    gain, room = information - expected, mean_entropy - expected
    return math.copysign(max(abs(gain), smallest), gain) / math.copysign(max(abs(room), smallest), room)

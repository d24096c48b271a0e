"""What a division of solutions tells about the solution of a given input, and how long a code it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

ROUNDS = 4
"""Times that a division is fitted anew."""
WORST = 0.2
"""Share of the halvings that count, those with the longest codes."""
ALIKE = 0.1
"""Nats that one division may leave open of another that it repeats."""


def merge(labels: Labels, count: int, group: int) -> Labels:
    """Return ``labels`` with the parts merged, two by two, that cost least of I(z; y|x), until K are left.

    Parts that are the same way of solving in different inputs do not meet in one input: merging them costs nothing.
    Source: after the agglomerative information bottleneck (Slonim & Tishby 1999).
    """
    parts = shares_of(labels, group).T  # [parts, inputs]
    owner = np.arange(len(parts))
    while len(parts) > count:
        entropy = entropies(parts)
        costs = np.array([entropy[i] + entropy - entropies(parts[i] + parts) for i in range(len(parts))])
        np.fill_diagonal(costs, np.inf)
        into, gone = sorted(np.unravel_index(costs.argmin(), costs.shape))
        owner[owner == gone] = into
        owner[owner > gone] -= 1
        parts[into] += parts[gone]
        parts = np.delete(parts, gone, 0)
    return owner[labels]


class Folds:
    """Folds of points [N, F], of which each is judged by a linear discriminant of all the others.

    What does not depend on the labels is computed once.

    Args:
        points: [N, F].
        fold: the fold of each, [N].
    """

    def __init__(self, points: Floats, fold: Labels) -> None:
        self.points = points
        self.parts = [np.flatnonzero(fold == number) for number in np.unique(fold)]
        self.scatters = [points[part].T @ points[part] for part in self.parts]  # [F, F]
        self.scatter = sum(self.scatters)

    def log_probs(self, labels: Labels, count: int, size: int | None = None) -> Floats | None:
        """Return log p(label|point) of every point [N, K], from its first ``size`` features and the other folds.

        None where a label is missing in the other folds. Normal densities of one covariance, 5 % of which is taken off
        its diagonal's neighbours.
        """
        points = self.points[:, :size]
        onehot = np.eye(count)[labels]
        found = np.empty((len(points), count))
        sums, counts = onehot.T @ points, onehot.sum(0)
        for part, scatter in zip(self.parts, self.scatters, strict=True):
            number = counts - onehot[part].sum(0)
            if not number.all():
                return None
            means = (sums - onehot[part].T @ points[part]) / number[:, None]
            within = (self.scatter - scatter)[:size, :size] - (means.T * number) @ means
            covariance = 0.95 * within + 0.05 * np.diag(np.diag(within))
            covariance[np.diag_indices_from(covariance)] += 1e-9 * np.trace(within) + 1e-12
            weights = np.linalg.solve(covariance / number.sum(), means.T)  # [F, K]
            bias = np.log(number / number.sum()) - 0.5 * (means.T * weights).sum(0)
            logits = points[part] @ weights + bias
            shifted = logits - logits.max(-1, keepdims=True)
            found[part] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return found


def folds_of(components: Mapping[str, Floats], groupings: Sequence[Labels], group: int) -> list[list[Folds]]:
    """Return the folds of every view, for each grouping of the inputs.

    Args:
        components: of the views, [N * M, F] each, M solutions of an input in a row.
        groupings: groups of the inputs, [N] each.
        group: M.
    """
    return [[Folds(points, np.repeat(groups, group)) for points in components.values()] for groups in groupings]


def refine(folds: Folds, labels: Labels, count: int) -> Labels:
    """Return ``labels`` as linear discriminants of the other folds of inputs would have them, a few times over.

    A discriminant sees directions that k-means, for which all weigh the same, cannot; and what was true of some inputs
    only does not come back from the others. Source: after Ding & Li 2007, doi 10.1145/1273496.1273562.
    """
    for _ in range(ROUNDS):
        log_probs = folds.log_probs(labels, count)
        if log_probs is None or len(np.unique(fitted := log_probs.argmax(-1))) < count:
            break
        labels = fitted
    return labels


def code_length(folds: Folds, labels: Labels, count: int) -> float:
    """Return the nats that a label takes, given its point, from a linear discriminant of the other folds of inputs.

    The mean over 1.5, 3 and 6 K principal components: what shows in few of them is simpler. Folds of inputs that are
    like each other ask whether what is true of some inputs holds for unlike ones, as a way of solving does.
    Source: after Voita & Titov 2020, arXiv 2003.12298 (description length as the measure of a probe), and Peters et al.
    2016, arXiv 1501.01332 (invariance across environments).
    """
    number = int(labels.max()) + 1  # K, or fewer
    lengths = []
    for size in (3 * count // 2, 3 * count, 6 * count):
        log_probs = folds.log_probs(labels, number, size)
        if log_probs is None:
            return float(np.log(count))
        right = np.exp(log_probs[np.arange(len(labels)), labels])
        lengths.append(-np.log(0.999 * right + 0.001 / count).mean())
    return float(np.mean(lengths))


def in_all_views(folds: Sequence[Folds], labels: Labels, count: int) -> float:
    """Return the geometric mean of the code lengths in several views."""
    return float(np.exp(np.mean([np.log(code_length(fold, labels, count)) for fold in folds])))


def shares_of(labels: Labels, group: int) -> Floats:
    """Return the shares of the labels among the solutions of every input, [inputs, labels]."""
    return np.eye(labels.max() + 1)[labels].reshape(-1, group, labels.max() + 1).mean(1)


def entropies(shares: Floats) -> Floats:
    """Return the mean of -p log p over the last axis."""
    return -(shares * np.log(np.maximum(shares, 1e-12))).mean(-1)


def information(labels: Labels, group: int) -> float:
    """Return I(z; y|x) = H(z|x) of labels [N * M], in nats."""
    return float(entropies(shares_of(labels, group).T).sum())


def repeats(labels: Labels, others: list[Labels]) -> bool:
    """Whether one of the other divisions leaves next to nothing of this one open: H(z|z') is small."""
    size = int(labels.max()) + 1
    for other in others:
        joint = np.zeros((size, int(other.max()) + 1))
        np.add.at(joint, (labels, other), 1 / len(labels))
        given = joint / np.maximum(joint.sum(0), 1e-12)
        if -(joint * np.log(np.maximum(given, 1e-12))).sum() < ALIKE:
            return True
    return False


def tells(folds: Sequence[Sequence[Folds]], labels: Labels, count: int, group: int) -> float:
    """Return I(z; y|x) less the code length of z in the worst environment, in nats.

    Args:
        folds: of all views, in each environment.
        labels: 0 to K - 1, or fewer, [N * M].
        count: K.
        group: M.
    """
    return information(labels, group) - max(in_all_views(fold, labels, count) for fold in folds)


def holds(halves: Sequence[Sequence[Folds]], labels: Labels, count: int, group: int) -> float:
    """Return I(z; y|x) less the code length of z where one half of the inputs is judged by the other, in nats.

    The mean over the worst fifth of the halvings, in the view that shows z best. A division that swaps two ways of
    solving for some inputs can pass where one group of them is judged by all the others, as some of these are swapped
    as well; it does not where all of them are on one side.

    Args:
        halves: of all views, for each way to halve the inputs.
        labels: 0 to K - 1, or fewer, [N * M].
        count: K.
        group: M.
    """
    lengths = np.array([[code_length(fold, labels, count) for fold in folds] for folds in halves])  # [halvings, views]
    worst = np.sort(lengths, axis=0)[-max(1, round(WORST * len(lengths))) :]
    return information(labels, group) - float(worst.mean(0).min())

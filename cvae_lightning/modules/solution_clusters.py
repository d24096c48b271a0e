"""Clusters of solutions that say something about the solution of a given input."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

COMPONENTS = 16
"""Principal components of a view that are kept, in units of K."""
STARTS = 4
"""Seeds of k-means for each number of components and degree of whitening."""
REFINED = 128
"""Divisions by k-means that are gone on with: those of the most information about the solution of an input."""
ROUNDS = 4
ALIKE = 0.1
"""Nats that one division may leave open of another that it repeats."""


@dataclass(frozen=True)
class Clusters:
    """A division of solutions: labels [N], points [N, 2] to draw, what it tells in nats, and the view that showed it.

    What it tells: I(z; y|x) less the code length of z (see :func:`cluster`).
    """

    labels: Tensor
    points: Tensor
    information: float
    view: str


def combine(views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the views of the hidden states side by side, those of the attention, and all of them, [N, F] each.

    Every one counts with the same mean square.
    """
    scaled = {name: view / view.square().sum(-1).mean().sqrt().clamp_min(1e-12) for name, view in views.items()}
    kinds = {name.partition(",")[0] for name in views}
    joint = {kind: torch.cat([v for name, v in scaled.items() if name.startswith(kind)], -1) for kind in sorted(kinds)}
    return joint if len(joint) == 1 else joint | {" and ".join(joint): torch.cat(list(joint.values()), -1)}


def cluster(views: Mapping[str, Tensor], count: int, group: int, seed: int) -> Clusters | None:
    """Return the division of centred points that tells most, and most simply, about the solution of an input.

    k-means starts from several views, numbers of principal components, degrees of whitening and seeds; what it finds is
    refined by :func:`refine` in all views together. Wins what has the most I(z; y|x) = H(z|x), the mean entropy of the
    labels of one input, less their code length, given the points. The entropy is small for a division by what is in x,
    or by what only some inputs have. But noise divides every input evenly, and so does a division that swaps two ways
    of solving for half of the inputs: their labels take more to read off the points (see :func:`code_length`), which
    a way of solving does in every view: its code lengths count by their geometric mean.

    Args:
        views: [N * M, F] each, M solutions of an input in a row; the last one is all of them together.
        count: K clusters.
        group: M.
        seed: of k-means.

    Returns:
        None where fewer than K points differ.
    """
    components = {name: points for name, view in views.items() if (points := principal(view, count)) is not None}
    if not components:
        return None
    divisions = [
        (information(labels, group), name, labels)
        for name, points in components.items()
        for labels in k_means(points, count, group, seed, name)
    ]
    divisions.sort(key=lambda division: -division[0])
    best: Clusters | None = None
    joint = components[list(components)[-1]]
    tried: list[Labels] = []
    refined: list[Labels] = []
    for _, view, start in tqdm(divisions[:REFINED], desc="seeding: clusters, refined", leave=False, disable=None):
        if repeats(start, tried):
            continue
        tried.append(start)
        labels = refine(joint, start, count, group)
        if repeats(labels, refined):
            continue
        refined.append(labels)
        lengths = [code_length(points, labels, count, group) for points in components.values()]
        value = information(labels, group) - float(np.exp(np.mean(np.log(lengths))))
        if best is None or value > best.information:
            drawn = torch.from_numpy(components[view][:, :2]).float()
            best = Clusters(torch.from_numpy(labels), drawn, value, view)
    return best


def principal(view: Tensor, count: int) -> Floats | None:
    """Return the principal components [N, C] of centred points; None where fewer than K differ."""
    width = min(COMPONENTS * count, *view.shape)
    left, scale, _ = torch.pca_lowrank(view, min(width + 8, *view.shape), center=False, niter=4)
    points = (left * scale)[:, :width].cpu().double()
    different = points[:, : 4 * count].round(decimals=4).unique(dim=0)
    return points.numpy() if len(different) >= count else None


def k_means(points: Floats, count: int, group: int, seed: int, name: str) -> Iterator[Labels]:
    """Yield divisions by k-means into K, and into 2K merged to K."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    scale = np.sqrt((points**2).sum(0))
    sizes = sorted({min(factor * count, points.shape[1]) for factor in (1, 2, 3, 4)})
    tries = list(product(sizes, (0.25, 0.5, 0.75, 1.0), range(STARTS)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer than 2K different points
        for size, power, start in tqdm(tries, desc=f"seeding: clusters by {name}", leave=False, disable=None):
            whitened = points[:, :size] / np.maximum(scale[:size], 1e-6 * scale[0]) ** power
            parts = count * (1 + start % 2)
            model = KMeans(min(parts, len(points)), n_init=1, random_state=(seed + start) % 2**32)
            yield merge(model.fit(whitened).labels_.astype(np.int64), count, group)


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


def refine(points: Floats, labels: Labels, count: int, group: int) -> Labels:
    """Return ``labels`` as the linear discriminants of the other half of the inputs would have them, a few times over.

    A discriminant sees directions that k-means, for which all weigh the same, cannot; and what was true of some inputs
    only does not come back from the other half. Source: after Ding & Li 2007, doi 10.1145/1273496.1273562.
    """
    for _ in range(ROUNDS):
        if any(len(np.unique(labels[half])) < count for half in halves(len(points), group)):
            break
        fitted = labels.copy()
        for half in halves(len(points), group):
            fitted[half] = discriminant(points[~half], labels[~half]).predict(points[half])
        if len(np.unique(fitted)) < count:
            break
        labels = fitted
    return labels


def code_length(points: Floats, labels: Labels, count: int, group: int) -> float:
    """Return the nats that a label takes, given its point, from a linear discriminant of the other half of the inputs.

    The mean over 1.5, 3 and 6 K principal components: what shows in few of them is simpler.
    Source: after Voita & Titov 2020, arXiv 2003.12298 (description length as the measure of a probe).
    """
    if any(len(np.unique(labels[half])) < 2 for half in halves(len(points), group)):
        return float(np.log(count))
    lengths = []
    for half in halves(len(points), group):
        for size in (3 * count // 2, 3 * count, 6 * count):
            model = discriminant(points[half, :size], labels[half])
            probs = np.zeros((int((~half).sum()), count))
            probs[:, model.classes_] = model.predict_proba(points[~half, :size])
            right = probs[np.arange(len(probs)), labels[~half]]
            lengths.append(-np.log(0.999 * right + 0.001 / count).mean())
    return float(np.mean(lengths))


def discriminant(points: Floats, labels: Labels) -> Any:
    """Return a linear discriminant of ``labels``, fitted."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Only one sample")  # of a label; it adds nothing to the covariance
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.05).fit(points, labels)


def halves(size: int, group: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return masks [N] of the solutions of every other input, and of the rest."""
    even = np.arange(size) // group % 2 == 0
    return even, ~even


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

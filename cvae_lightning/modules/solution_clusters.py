"""Clusters of solutions that say something about the solution of a given input."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Clusters:
    """A division of solutions: labels [N], points [N, 2] to draw, I(z; y|x) in nats, and the view it was found in."""

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
    """Return the k-means clusters of centred points that tell most, and dependably, about the solution of an input.

    Several views, numbers of principal components, degrees of whitening and starts are tried; see :func:`divide` for
    what wins.

    Args:
        views: [N * M, F] each, M solutions of an input in a row.
        count: K clusters.
        group: M.
        seed: of k-means.

    Returns:
        None where fewer than K points differ.
    """
    best: Clusters | None = None
    for name, points in views.items():
        width = min(4 * count, *points.shape)
        left, scale, _ = torch.pca_lowrank(points, min(width + 8, *points.shape), center=False, niter=4)
        components = (left * scale)[:, :width].cpu()  # [N * M, C]
        if len(components.round(decimals=4).unique(dim=0)) < count:
            continue
        sizes = sorted({min(factor * count, width) for factor in (2, 3, 4)})
        tries = list(product(sizes, (0.25, 0.5, 0.75, 1.0), range(4)))
        for size, power, start in tqdm(tries, desc=f"seeding: clusters by {name}", leave=False, disable=None):
            scaled = components[:, :size] / scale[:size].cpu().clamp_min(1e-6 * float(scale[0])) ** power
            labels, information = divide(scaled, count, group, (seed + start) % 2**32)
            if best is None or information > best.information:
                best = Clusters(labels, components[:, :2], information, name)
    return best


def divide(points: Tensor, count: int, group: int, seed: int) -> tuple[Tensor, float]:
    """Return k-means labels z [N * M], and what they say about the solution of a given input, in nats.

    I(z; y|x) = H(z|x), the mean entropy of the labels of one input, is small for a division by what is in x, or by what
    only some inputs have. But noise divides every input evenly; so what the labels lose between halves of the inputs is
    taken off: H(z_a|z_b) of all points, z_a from the centres of one half, z_b from the same centres fitted on to the
    other half.
    Source: Lange et al. 2004, doi 10.1162/089976604773717621 (stability); the combination is this package's.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import pairwise_distances_argmin

    x = points.double().numpy()
    half = (torch.arange(len(points)) // group % 2 == 0).numpy()
    one, other = (x[half], x[~half]) if (~half).sum() >= count else (x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a half with fewer than K different points
        first = KMeans(count, n_init=1, random_state=seed).fit(one).cluster_centers_
        second = KMeans(count, init=first, n_init=1).fit(other).cluster_centers_
        labels = torch.as_tensor(KMeans(count, init=first, n_init=1).fit(x).labels_, dtype=torch.int64)
    z_a, z_b = (torch.as_tensor(pairwise_distances_argmin(x, centres)) for centres in (first, second))
    joint = torch.zeros(count, count, dtype=torch.float64).index_put_((z_a, z_b), torch.tensor(1.0).double(), True)
    joint /= joint.sum()
    shares = nn.functional.one_hot(labels, count).double().unflatten(0, (-1, group)).mean(1)  # [inputs, K]
    kept = torch.special.entr(shares).sum(-1).mean()
    lost = torch.special.entr(joint).sum() - min(torch.special.entr(joint.sum(axis)).sum() for axis in (0, 1))
    return labels, float(kept - lost)

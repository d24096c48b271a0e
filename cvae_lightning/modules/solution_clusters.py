"""Clusters of solutions that say something about the solution of a given input."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from cvae_lightning.modules.input_groups import GROUPS
from cvae_lightning.modules.solution_divisions import (
    Floats,
    Folds,
    Labels,
    folds_of,
    holds,
    in_all_views,
    information,
    merge,
    refine,
    repeats,
    tells,
)
from cvae_lightning.progress import progress

COMPONENTS = 16
"""Principal components of a view that are kept, in units of K."""
STARTS = 8
"""Seeds of k-means for each number of components and degree of whitening."""
REFINED = 128
"""Divisions by k-means that are gone on with: those of the most information about the solution of an input."""
SHORTLIST = 16
"""Divisions that are judged in every environment: the best ones in the first."""
CLOSE = 0.05
"""Share of what the best division tells by which another one may tell less, and tell about as much."""
ALMOST = 0.1
"""Share that merged clusters may tell less for a division into so many to be looked for from scratch."""
CLEARLY = 0.04
"""Share by which another one has to hold better to take its place: the same ways are found in several forms."""

Division = tuple[float, str, Labels]
"""What a division of solutions tells in nats, the view that showed it, and its labels."""


@dataclass(frozen=True)
class Clusters:
    """A division of solutions into ways of solving, and what each of K latents is for.

    Args:
        labels: the way of solving of every solution, [N].
        ways: that of every latent, [K]: 0 to K - 1 in order, or fewer, of which some have several latents.
        points: to draw, [N, 2].
        information: what it tells in nats: I(z; y|x) less the code length of z (see :func:`cluster`).
        view: the view that showed it.
    """

    labels: Tensor
    ways: Tensor
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


def cluster(
    views: Mapping[str, Tensor],
    count: int,
    group: int,
    seed: int,
    environments: Sequence[Labels] = (),
    sides: Sequence[Labels] = (),
    bar: bool = True,
) -> Clusters | None:
    """Return the division of centred points that tells most, and most simply, about the solution of an input.

    k-means starts from several views, numbers of principal components, degrees of whitening and seeds; what it finds is
    refined by :func:`refine` in all views together. Wins what has the most I(z; y|x) = H(z|x), the mean entropy of the
    labels of one input, less their code length, given the points. The entropy is small for a division by what is in x,
    or by what only some inputs have. But noise divides every input evenly, and so does a division that swaps two ways
    of solving for some of the inputs. A way of solving shows in every view, as noise does not: the code lengths in the
    views count by their geometric mean. And it is the same one for unlike inputs: it is the code length of the worst
    environment that counts, where each group of inputs is judged by all others (see :func:`code_length`). Between
    divisions that tell about the same decides what holds from one half of the inputs to the other (see :func:`decide`).

    K may be larger than the number of ways of solving. Where a division into fewer clusters tells about as much, so
    many ways there are (see :func:`fewer`), and the latents are shared out among them (see :func:`latents_of`).

    Args:
        views: [N * M, F] each, M solutions of an input in a row; the last one is all of them together.
        count: K clusters.
        group: M.
        seed: of k-means.
        environments: groups of the inputs, [N] each; none = every eighth input.
        sides: halves of the inputs, 0 or 1, [N] each, that decide between divisions which tell about the same.
        bar: whether progress bars show the time left.

    Returns:
        None where fewer than K points differ.
    """
    components = {name: points for name, view in views.items() if (points := principal(view, count)) is not None}
    if not components:
        return None
    size = len(next(iter(components.values()))) // group
    folds = folds_of(components, environments or [np.arange(size) % GROUPS], group)

    def best(number: int) -> Division:
        judged = candidates(components, folds, number, group, seed, bar)
        return decide(judged, components, sides, number, group, bar)

    first = best(count)
    value, view, labels = fewer(folds, first, best, count, group) or first
    ways = latents_of(np.bincount(labels), count)
    drawn = torch.from_numpy(components[view][:, :2]).float()
    return Clusters(torch.from_numpy(labels), torch.from_numpy(ways), drawn, value, view)


def candidates(
    components: Mapping[str, Floats],
    folds: Sequence[Sequence[Folds]],
    count: int,
    group: int,
    seed: int,
    bar: bool,
) -> list[Division]:
    """Return divisions into K clusters, the one that tells most first (see `cluster`).

    Args:
        components: principal components of the views.
        folds: of all views, in each environment.
        count: K.
        group: M.
        seed: of k-means.
        bar: whether progress bars show the time left.
    """
    divisions = [
        (information(labels, group), name, labels)
        for name, points in components.items()
        for labels in k_means(points, count, group, seed, name, bar)
    ]
    divisions.sort(key=lambda division: -division[0])
    tried: list[Labels] = []
    found: list[Division] = []
    for _, view, start in progress(divisions[:REFINED], "seeding: clusters, refined", bar):
        if repeats(start, tried):
            continue
        tried.append(start)
        labels = refine(folds[0][-1], start, count)
        if not repeats(labels, [other for _, _, other in found]):
            found.append((information(labels, group) - in_all_views(folds[0], labels, count), view, labels))
    found.sort(key=lambda division: -division[0])
    judged = [(tells(folds, labels, count, group), view, labels) for _, view, labels in found[:SHORTLIST]]
    return sorted(judged, key=lambda division: -division[0])  # the best one first


def decide(
    judged: Sequence[Division],
    components: Mapping[str, Floats],
    sides: Sequence[Labels],
    count: int,
    group: int,
    bar: bool,
) -> Division:
    """Return the division that tells most, or one that tells about as much and holds clearly better (see `holds`).

    Args:
        judged: divisions, the one that tells most first.
        components: principal components of the views.
        sides: of the inputs, 0 or 1, [N] each; none = the first division.
        count: K.
        group: M.
        bar: whether a progress bar shows the time left.
    """
    first = judged[0]
    close = [division for division in judged if division[0] >= first[0] - CLOSE * abs(first[0])]
    if len(close) == 1 or not sides:
        return first
    halves = folds_of(components, sides, group)
    shown = progress(close, "seeding: clusters, compared", bar)
    held = [holds(halves, labels, count, group) for _, _, labels in shown]
    clearly = max(held) - held[0] > CLEARLY * abs(held[0])
    return close[int(np.argmax(held))] if clearly else first


def fewer(
    folds: Sequence[Sequence[Folds]], first: Division, search: Callable[[int], Division], count: int, group: int
) -> Division | None:
    """Return a division into the fewest clusters that tells about as much as the best one.

    Two clusters of one way of solving do not meet in one input: apart they tell no more than together, and take a
    longer code. Merging two ways takes away much of what is told. So merging shows how many ways there may be; but
    what is best into K clusters may mix them, and what is best into fewer is looked for from scratch as well.

    Args:
        folds: of all views, in each environment.
        first: the best division into K clusters.
        search: for the best division into so many.
        count: K.
        group: M.

    Returns:
        None where every division into fewer clusters tells much less.
    """
    best, view, merged = first
    divisions: list[Division] = []
    for number in range(count - 1, 1, -1):
        merged = merge(merged, number, group)
        refined = refine(folds[0][-1], merged, number)
        judged = [(tells(folds, labels, count, group), view, labels) for labels in (merged, refined)]
        division = max(judged, key=lambda pair: pair[0])
        if division[0] < best - ALMOST * abs(best):
            break
        best = max(best, division[0])
        divisions.append(division)
    for division in reversed(divisions):
        _, other, labels = search(int(division[2].max()) + 1)
        anew = tells(folds, labels, count, group), other, labels
        division = max(division, anew, key=lambda pair: pair[0])
        if division[0] >= best - CLOSE * abs(best):
            return division
    return None


def latents_of(sizes: Labels, count: int) -> Labels:
    """Return the way of solving of every latent, [K]: one latent for each, the others for those of most solutions.

    Latents of one way are all seeded with the whole of it. Parts of it would leave open what a latent writes for the
    other solutions, and most divide a way by x, of which z says nothing.

    Args:
        sizes: of the ways, [W].
        count: K, W at least.
    """
    ways = list(range(len(sizes)))
    while len(ways) < count:
        ways.append(int((sizes / np.bincount(ways)).argmax()))
    return np.array(ways)


def spread(shares: Tensor, solutions: Sequence[str], group: int) -> Tensor:
    """Return shares of the ways that are undecided where different solutions of an input are taken for one way.

    An input with at most as many solutions as there are ways of solving has a way for each of them. Where two of them
    are put to one way and another way has none, the points do not tell which belongs to which: the solutions of that
    way are put to it and to the ways without any in equal parts. A solution that was drawn once may be an accident, and
    does not count. Where solutions hardly repeat, as longer texts do, nothing is spread.

    Shape:
        shares: [N * M, W] -> [N * M, W] fp32.

    Args:
        shares: one for the way of a solution, else zero; M solutions of an input in a row.
        solutions: their texts.
        group: M.
    """
    shares, labels, count = shares.clone(), shares.argmax(-1), shares.shape[-1]
    for start in range(0, len(labels), group):
        rows = labels[start : start + group]
        drawn = Counter(zip(solutions[start : start + group], rows.tolist(), strict=True))
        found = Counter(way for (_, way), times in drawn.items() if times > 1)
        empty = [way for way in range(count) if way not in found]
        if found.total() > count or not empty:
            continue
        for way in (way for way, number in found.items() if number > 1):
            among = torch.isin(torch.arange(count), torch.tensor([way, *empty])).float()
            shares[start : start + group][rows == way] = among / among.sum()
    return shares


def principal(view: Tensor, count: int) -> Floats | None:
    """Return the principal components [N, C] of centred points; None where fewer than K differ."""
    width = min(COMPONENTS * count, *view.shape)
    left, scale, _ = torch.pca_lowrank(view, min(width + 8, *view.shape), center=False, niter=4)
    points = (left * scale)[:, :width].cpu().double()
    different = points[:, : 4 * count].round(decimals=4).unique(dim=0)
    return points.numpy() if len(different) >= count else None


def k_means(points: Floats, count: int, group: int, seed: int, name: str, bar: bool) -> Iterator[Labels]:
    """Yield divisions by k-means into K, and into 2K merged to K."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    scale = np.sqrt((points**2).sum(0))
    sizes = sorted({min(factor * count, points.shape[1]) for factor in (1, 2, 3, 4)})
    tries = list(product(sizes, (0.25, 0.5, 0.75, 1.0), range(STARTS)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer than 2K different points
        for size, power, start in progress(tries, f"seeding: clusters by {name}", bar):
            whitened = points[:, :size] / np.maximum(scale[:size], 1e-6 * scale[0]) ** power
            parts = count * (1 + start % 2)
            model = KMeans(min(parts, len(points)), n_init=1, random_state=(seed + start) % 2**32)
            yield merge(model.fit(whitened).labels_.astype(np.int64), count, group)

"""Figures of a continuous latent as pure functions: numbers in, one matplotlib ``Figure`` out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import ArrayLike


def principal_plane(points: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (centre [D], axes [2, D], share of variance [2]) of the plane that points [N, D] vary in most.

    With D = 1 the second axis is zero.
    """
    values = np.asarray(points, dtype=float)
    centre = values.mean(0)
    _, scale, axes = np.linalg.svd(values - centre, full_matrices=False)
    share = scale**2 / max(float((scale**2).sum()), 1e-12)
    plane, shares = np.zeros((2, values.shape[1])), np.zeros(2)
    count = min(2, len(axes))
    plane[:count], shares[:count] = axes[:count], share[:count]
    return centre, plane, shares


def latent_scatter(
    posterior: ArrayLike,
    router: ArrayLike,
    labels: Sequence[int],
    names: Sequence[str],
    centroids: Sequence[ArrayLike] = (),
    title: str = "latents",
) -> Figure:
    """Draw posterior and router means in the plane that the posterior means vary in most.

    Args:
        posterior, router: [N, D] means.
        labels: N strategies, -1 where unknown (grey).
        names: their names.
        centroids: [K, D] cluster centroids of every evaluation so far, the last one's drawn large; the way there thin.
        title: text above the picture.
    """
    centre, axes, share = principal_plane(posterior)
    label = np.asarray(labels)
    fig = Figure(figsize=(9.0, 4.4), layout="constrained")
    left, right = fig.subplots(1, 2, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    colour = [colormaps["tab10"](i % 10) for i in range(max(1, len(names)))]
    for ax, values, what in ((left, posterior, "posterior means"), (right, router, "router means")):
        flat = (np.asarray(values, dtype=float) - centre) @ axes.T
        for s in (-1, *range(len(names))):
            shown = label == s
            if shown.any():
                name = names[s] if s >= 0 else "unknown"
                points = ax.scatter(*flat[shown].T, s=9, alpha=0.6, color="0.6" if s < 0 else colour[s], linewidths=0)
                handles.setdefault(name, points)  # not by label: matplotlib leaves out those that begin with _
        ax.set_title(what, fontsize=10)
        ax.set_xlabel(f"first axis ({share[0]:.0%} of the variance)")
        ax.locator_params(axis="x", nbins=6)  # or the numbers of small latents run into each other
    left.set_ylabel(f"second axis ({share[1]:.0%})")
    if len(centroids):
        path = (np.stack([np.asarray(c, dtype=float) for c in _same_shape(centroids)]) - centre) @ axes.T  # [E, K, 2]
        for k in range(path.shape[1]):
            left.plot(*path[:, k].T, color="black", linewidth=0.7, alpha=0.6)
            left.annotate(f"c{k}", path[-1, k], xytext=(4, 4), textcoords="offset points", fontsize=9)
        left.scatter(*path[-1].T, s=70, marker="X", color="black", edgecolors="white", linewidths=0.8)
    if handles:
        legend = fig.legend([*handles.values()], [*handles], loc="outside right upper", fontsize=8, markerscale=2)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a $ in the name of a strategy is no formula
    fig.suptitle(title, fontsize=11)
    return fig


def _same_shape(history: Sequence[ArrayLike]) -> list[np.ndarray]:
    """Return the last entries of a history that have the shape of the last one, matched to it one to one."""
    from scipy.optimize import linear_sum_assignment

    arrays = [np.asarray(entry, dtype=float) for entry in history]
    kept: list[np.ndarray] = [arrays[-1]]
    for array in reversed(arrays[:-1]):
        if array.shape != kept[0].shape:
            break
        distance = ((kept[0][:, None] - array[None]) ** 2).sum(-1)
        kept.insert(0, array[linear_sum_assignment(distance)[1]])
    return kept


def router_marginal(
    mean: ArrayLike, variance: ArrayLike, samples: ArrayLike | None = None, title: str = "router marginal and N(0, I)"
) -> Figure:
    """Draw the moment-matched marginal of the routers beside the standard normal, one panel per dimension.

    Args:
        mean, variance: [D] of the marginal.
        samples: [N, D] router means, drawn as a histogram.
        title: text above the picture.
    """
    mean, variance = np.asarray(mean, dtype=float), np.asarray(variance, dtype=float)
    shown = min(len(mean), 8)
    columns = min(4, shown)
    lines = -(-shown // columns)
    fig = Figure(figsize=(max(4.0, 2.25 * columns), 0.8 + 2.0 * lines), layout="constrained")
    panels = fig.subplots(lines, columns, squeeze=False).ravel()
    for d, ax in enumerate(panels):
        if d >= shown:
            ax.set_axis_off()
            continue
        deviation = max(float(np.sqrt(variance[d])), 1e-3)
        reach = max(3.0, abs(mean[d]) + 3 * deviation)
        grid = np.linspace(-reach, reach, 400)
        if samples is not None:
            ax.hist(np.asarray(samples)[:, d], bins=30, density=True, color="0.8", label="router means")
        ax.plot(grid, _density(grid, 0.0, 1.0), color="black", linestyle="--", label="N(0, 1)")
        ax.plot(grid, _density(grid, mean[d], deviation), color="tab:blue", label="router marginal")
        ax.set_ylim(0, 1.3 * max(0.4, min(2.0, _density(mean[d], mean[d], deviation))))
        ax.set_title(f"d{d}: mean {mean[d]:.2f}, variance {variance[d]:.2f}", fontsize=8)
        ax.tick_params(labelsize=7)
    handles, texts = panels[0].get_legend_handles_labels()
    fig.legend(handles, texts, loc="outside lower center", ncols=3, fontsize=8)
    hidden = "" if shown == len(mean) else f" (first {shown} of {len(mean)} dimensions)"
    fig.suptitle(title + hidden, fontsize=11)
    return fig


def _density(at: Any, mean: float, deviation: float) -> Any:
    return np.exp(-0.5 * ((at - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))


def centroid_distances(distances: ArrayLike, title: str = "distance between cluster centroids") -> Figure:
    """Draw the [K, K] distances between centroids, in latent units."""
    values = np.asarray(distances, dtype=float)
    count = len(values)
    size = min(9.0, 3.2 + 0.45 * count)
    fig = Figure(figsize=(size + 0.9, size), layout="constrained")
    ax = fig.add_subplot()
    top = max(float(values.max()), 1e-6)
    image = ax.imshow(values, cmap="Blues", vmin=0, vmax=top)
    for (i, j), value in np.ndenumerate(values):
        if count <= 12:
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 * top else "black")
    names = [f"c{k}" for k in range(count)]
    ax.set_xticks(range(count), names)
    ax.set_yticks(range(count), names)
    ax.set_title(title, fontsize=10)
    fig.colorbar(image, ax=ax, label="latent units", shrink=0.85)
    return fig
